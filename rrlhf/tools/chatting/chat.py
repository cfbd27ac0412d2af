"""Chat: one prompt, answered by one or two models side by side, with what an ensemble of reward models thinks of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

import torch

from rrlhf.hardware import device_kind
from rrlhf.models.load import LanguageModel, load_model
from rrlhf.models.rollout import Response, most_likely, sample_in_batches
from rrlhf.models.text import Texts, decode
from rrlhf.rewards.scoring import RewardModel, load_reward_model
from rrlhf.robust import head_spread, mean_reward, worst_reward
from rrlhf.tools.chatting.named import Judge, Named
from rrlhf.types import Message


class Score(TypedDict):
    """What the ensemble says of one response, normalised: 0 is the average response of the SFT model."""

    mean: float
    worst: float
    spread: float  # standard deviation over heads
    heads: list[float]


class Answer(TypedDict):
    """One model's answer."""

    model: str
    text: str
    finished: bool
    score: Score | None  # None: no ensemble is at hand


class Chat:
    """The models of one conversation, and the reward model that judges them."""

    def __init__(self, models: Sequence[Named], judge: Judge | None, device: str) -> None:
        kind = torch.device(device_kind(device))
        self.speakers = [(each, load_model(each.folder)) for each in models]
        for _, language in self.speakers:
            language.network.to(kind).requires_grad_(False)
        self.ensemble = load_reward_model(judge.artifact.path, judge.sft, kind) if judge else None

    def answers(self, prompt: str, seed: int | None = None) -> list[Answer]:
        """Return every model's answer to a prompt, with its score.

        The most likely tokens; with a seed, a sample at temperature 1, as in training.
        """
        asked = [Message(role="user", content=prompt)]
        said = [_response(named, language, asked, seed) for named, language in self.speakers]
        texts = [decode(language, each.tokens) for (_, language), each in zip(self.speakers, said, strict=True)]
        scores = _scores(self.ensemble, asked, texts) if self.ensemble else [None for _ in texts]
        return [
            {"model": named.name, "text": text, "finished": each.finished, "score": score}
            for (named, _), text, each, score in zip(self.speakers, texts, said, scores, strict=True)
        ]


def _response(named: Named, language: LanguageModel, asked: list[Message], seed: int | None) -> Response:
    texts = Texts(language, named.model)
    tokens = texts.prompt(asked)
    texts.told(named.name)
    if seed is not None:
        [sampled] = sample_in_batches(language, [tokens], named.model, batch_size=1, seed=seed, label="sampling")
        return sampled
    said = most_likely(language, tokens, named.model.response_tokens)
    return Response(said, finished=said[-1] in language.ends, logprob=0.0)


def _scores(ensemble: RewardModel, asked: list[Message], texts: Sequence[str]) -> list[Score]:
    scores = ensemble.score([asked for _ in texts], texts)
    columns = zip(mean_reward(scores), worst_reward(scores), head_spread(scores), scores.mean, strict=True)
    return [
        {"mean": mean.item(), "worst": worst.item(), "spread": spread.item(), "heads": heads.tolist()}
        for mean, worst, spread, heads in columns
    ]
