"""How surprised the base model is by a text: what tells the gold judge a sentence from a heap of words.

The base model is neither the policy nor the reward models' trunk as trained, and nothing trains against it.
"""

from collections.abc import Sequence

import torch

from rrlhf.config import Gold, Model
from rrlhf.data.tables import Rows
from rrlhf.hardware import device_kind
from rrlhf.judging.gold import GoldJudge, GoldScores
from rrlhf.models.load import LanguageModel, load_base
from rrlhf.models.processes import autocast, in_parts
from rrlhf.models.states import entering
from rrlhf.models.text import Texts, encode
from rrlhf.models.top import PolicyTop, split_responses
from rrlhf.types import Message

ROWS_PER_BATCH = 64
Row = tuple[tuple[int, ...], tuple[int, ...]]  # tokens of a prompt and of its response


class Surprise:
    """The base model as a reader: nats per token that a response surprises it by, as an answer to its prompt."""

    def __init__(self, model: Model) -> None:
        self._language: LanguageModel = load_base(model)
        self._language.network.to(device_kind(model.device)).requires_grad_(False)
        self._texts = Texts(self._language, model)
        self._top = PolicyTop(self._language, self._language.layers)
        self._model = model

    def per_token(
        self, prompts: Sequence[list[Message]], responses: Sequence[str], finished: Sequence[bool]
    ) -> list[float]:
        """Return -log p(response | prompt) / tokens for each response; its end counts where it is finished."""
        asked = [self._texts.prompt(prompt) for prompt in prompts]
        rows = [
            (tuple(prompt), (*encode(self._language, text), *([self._language.end] if done else [])))
            for prompt, text, done in zip(asked, responses, finished, strict=True)
        ]
        order = sorted({row for row in rows if row[1]})  # equal prompts side by side: each is read once
        known: dict[Row, float] = {}
        for part in in_parts(len(order), ROWS_PER_BATCH, "gold: fluency"):
            known |= zip(order[part], self._read(order[part]), strict=True)
        return [known.get(row, 0.0) for row in rows]

    @torch.no_grad()
    def _read(self, rows: Sequence[Row]) -> list[float]:
        whole = [[*prompt, *response] for prompt, response in rows]
        lengths, responses, mask = split_responses(whole, [len(prompt) for prompt, _ in rows], self._language.device)
        with autocast(self._model):
            logprobs, _ = self._top(entering(self._language, whole, self._top.first), lengths, responses, mask)
        means: list[float] = (-logprobs.double().sum(1) / mask.sum(1)).tolist()
        return means


class PromptedGold:
    """The gold judge for answers that are here as text: the base model reads them first."""

    def __init__(self, gold: Gold, model: Model) -> None:
        self._gold, self._surprise = GoldJudge(gold), Surprise(model)

    def score(self, asked: Rows, responses: list[str], finished: list[bool]) -> GoldScores:
        """Return what gold says of each response to its row of table `ppo` or `evaluate`."""
        surprise = self._surprise.per_token([row["prompt"] for row in asked], responses, finished)
        return self._gold.score([row["topic"] for row in asked], responses, finished, surprise)
