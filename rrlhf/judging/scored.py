"""A judge that is a reward model which the user has: a sequence classifier with one label scores every answer."""

from collections.abc import Sequence

from torch import Tensor

from rrlhf.config import Given, Model
from rrlhf.judging.evaluation import OwnJudge
from rrlhf.rewards.heads import RewardHeads
from rrlhf.rewards.scoring import RewardModel
from rrlhf.rewards.trunk import given_trunk
from rrlhf.types import Message


class Scorer:
    """The reward model as it is: its own tokenizer, chat template and score."""

    def __init__(self, settings: Given, model: Model, batch_size: int) -> None:
        trunk = given_trunk(settings, model)
        self._settings, self._batch_size = settings, settings.batch_size or batch_size
        self._model = RewardModel(RewardHeads(trunk.language.width, heads=1, hidden=0, sigma_floor=1.0), (trunk,))
        self._model.heads.take(trunk.language.score)

    def told(self) -> OwnJudge:
        """Say what was cut of the texts so far, and return what it is."""
        self._model.trunks[0].texts.told("evaluate: judge")
        return OwnJudge(self._settings.base)

    def score(self, prompts: Sequence[list[Message]], responses: Sequence[str], label: str) -> Tensor:
        """Return the score of each response as its `score` map gives it, [responses] float64."""
        return self._model.score(prompts, responses, self._batch_size, label).mean[:, 0].double()
