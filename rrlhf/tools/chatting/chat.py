"""Chat: one prompt, answered by one or two models side by side, with what an ensemble of reward models thinks of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypedDict

import torch

from rrlhf.config import Model, Params
from rrlhf.hardware import device_kind
from rrlhf.models.load import LanguageModel, load_model, most_likely
from rrlhf.models.rollout import Response, sample_in_batches
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


class Speaker(NamedTuple):
    """A model that answers, under the name that it was asked for by."""

    name: str
    language: LanguageModel
    model: Model


class Chat(NamedTuple):
    """The models of one conversation."""

    speakers: list[Speaker]
    ensemble: RewardModel | None
    judge: str | None  # the ensemble's name


def open_chat(models: Sequence[Named], judge: Judge | None, params: Params) -> Chat:
    """Load the models, and the reward model that judges them."""
    device = torch.device(device_kind(params.model.device))
    speakers = [_speaker(each, device) for each in models]
    if judge is None:
        return Chat(speakers, None, None)
    return Chat(speakers, load_reward_model(judge.artifact.path, judge.sft, device), judge.name)


def answers(chat: Chat, prompt: str, seed: int | None = None) -> list[Answer]:
    """Return every model's answer to a prompt, with its score.

    The most likely tokens; with a seed, a sample at temperature 1, as in training.
    """
    asked = [Message(role="user", content=prompt)]
    spoken = [_response(speaker, asked, seed) for speaker in chat.speakers]
    texts = [decode(speaker.language, said.tokens) for speaker, said in zip(chat.speakers, spoken, strict=True)]
    scores = _scores(chat.ensemble, asked, texts)
    return [
        {"model": speaker.name, "text": text, "finished": said.finished, "score": score}
        for speaker, text, said, score in zip(chat.speakers, texts, spoken, scores, strict=True)
    ]


def _speaker(named: Named, device: torch.device) -> Speaker:
    language = load_model(named.folder)
    language.network.to(device).requires_grad_(False)
    return Speaker(named.name, language, named.model)


def _response(speaker: Speaker, asked: list[Message], seed: int | None) -> Response:
    language, model = speaker.language, speaker.model
    texts = Texts(language, model)
    tokens = texts.prompt(asked)
    texts.told(speaker.name)
    if seed is not None:
        [sampled] = sample_in_batches(language, [tokens], model, batch_size=1, seed=seed, label="sampling")
        return sampled
    said = most_likely(language, tokens, model.response_tokens)
    return Response(said, finished=said[-1] in language.ends, logprob=0.0)


def _scores(ensemble: RewardModel | None, asked: list[Message], texts: Sequence[str]) -> list[Score | None]:
    if ensemble is None:
        return [None for _ in texts]
    scores = ensemble.score([asked for _ in texts], texts)
    columns = zip(mean_reward(scores), worst_reward(scores), head_spread(scores), scores.mean, strict=True)
    return [
        {"mean": mean.item(), "worst": worst.item(), "spread": spread.item(), "heads": heads.tolist()}
        for mean, worst, spread, heads in columns
    ]
