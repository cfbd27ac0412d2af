"""Chat: one prompt, answered by one or two models side by side, with what an ensemble of reward models thinks of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict

import torch

from rrlhf.hardware import device_kind
from rrlhf.models.load import LanguageModel, load_model
from rrlhf.models.rollout import most_likely, sample_in_batches
from rrlhf.models.text import Texts, decode
from rrlhf.rewards.scoring import load_reward_model
from rrlhf.robust import head_spread, mean_reward, worst_reward
from rrlhf.tools.chatting.command import Named
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

    def __init__(self, models: Sequence[Named], judge: Path | None, trunk: Path | None, device: str) -> None:
        kind = torch.device(device_kind(device))
        self.speakers = [(each, load_model(each.folder, each.model)) for each in models]
        for _, language in self.speakers:
            language.network.to(kind).requires_grad_(False)
        self.ensemble = load_reward_model(judge, trunk, kind) if judge and trunk else None

    def answers(self, prompt: str, seed: int | None = None) -> list[Answer]:
        """Return every model's answer to a prompt, with its score.

        The most likely tokens; with a seed, a sample at temperature 1, as in training.
        """
        asked = [Message(role="user", content=prompt)]
        return [self._answer(named, language, asked, seed) for named, language in self.speakers]

    def _answer(self, named: Named, language: LanguageModel, asked: list[Message], seed: int | None) -> Answer:
        texts = Texts(language, named.model)
        tokens = texts.prompt(asked)
        texts.told(named.name)
        if seed is None:
            said = most_likely(language, tokens, named.model.response_tokens)
            finished = said[-1] in language.ends
        else:
            [sampled] = sample_in_batches(language, [tokens], named.model, batch_size=1, seed=seed, label="sampling")
            said, finished = sampled.tokens, sampled.finished
        text = decode(language, said)
        return {"model": named.name, "text": text, "finished": finished, "score": self._score(asked, text)}

    def _score(self, asked: list[Message], text: str) -> Score | None:
        if self.ensemble is None:
            return None
        scores = self.ensemble.score([asked], [text])
        return {
            "mean": mean_reward(scores).item(),
            "worst": worst_reward(scores).item(),
            "spread": head_spread(scores).item(),
            "heads": scores.mean[0].tolist(),
        }
