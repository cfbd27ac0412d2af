"""A judge that is a reward model which the user has: a sequence classifier with one label scores every answer."""

from collections.abc import Sequence

import torch
from torch import Tensor

from rrlhf.config import Given, Model
from rrlhf.judging.evaluation import OwnJudge
from rrlhf.rewards.heads import RewardHeads
from rrlhf.rewards.trunk import given_trunk
from rrlhf.robust import Scores
from rrlhf.types import Message


class Scorer:
    """The reward model as it is: its own tokenizer, chat template and score."""

    def __init__(self, settings: Given, model: Model, batch_size: int) -> None:
        self._settings, self._trunk = settings, given_trunk(settings, model)
        self._batch_size = settings.batch_size or batch_size
        self._head = RewardHeads(self._trunk.language.width, heads=1, hidden=0, sigma_floor=1.0)
        self._head.take(self._trunk.language.score)

    def told(self) -> OwnJudge:
        """Say what was cut of the texts so far, and return what it is."""
        self._trunk.texts.told("evaluate: judge")
        return OwnJudge(self._settings.base)

    @torch.no_grad()
    def score(self, prompts: Sequence[list[Message]], responses: Sequence[str], label: str) -> Tensor:
        """Return the score of each response as its `score` map gives it, [responses] float64."""
        rows = [self._trunk.encode(*row) for row in zip(prompts, responses, strict=True)]
        scores: Scores = self._head(self._trunk.features(rows, self._batch_size, label))
        return scores.mean[:, 0].double()
