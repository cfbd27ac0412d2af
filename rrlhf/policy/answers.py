"""Given responses, of demonstrations or preference pairs, as the layers that train read them."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from rrlhf.config import Model
from rrlhf.models.processes import autocast, in_parts
from rrlhf.models.states import entering
from rrlhf.models.text import Texts
from rrlhf.models.top import split_responses
from rrlhf.policy.learner import Trained
from rrlhf.types import Message


class Answer(NamedTuple):
    """Tokens of a prompt with one response."""

    tokens: tuple[int, ...]
    prompt_length: int


def answer(texts: Texts, prompt: Sequence[Message], response: str) -> Answer:
    """Return a response as the model would say it; one that is cut has no end, for that would be in mid-sentence."""
    asked = texts.prompt(prompt)
    return Answer((*asked, *texts.answer(response)), len(asked))


class Answers:
    """Answers that are read again in every epoch: what the frozen layers leave of them stays the same and is kept."""

    def __init__(self, trained: Trained, rows: Sequence[Answer], model: Model, *, keep_states: bool = True) -> None:
        """Take the answers; without keep_states the frozen layers run again whenever an answer is read."""
        self.rows, self.trained = rows, trained
        self._model, self._keep_states = model, keep_states
        self._kept: dict[int, Tensor] = {}  # by row: states that enter the layers that train, [tokens, width], on CPU

    def __len__(self) -> int:
        return len(self.rows)

    def response_tokens(self, index: Sequence[int]) -> int:
        """Return how many tokens of some answers the prompts are not."""
        return sum(len(self.rows[i].tokens) - self.rows[i].prompt_length for i in index)

    def logprobs(self, policy: nn.Module, index: Sequence[int]) -> Tensor:
        """Return a policy's log-probabilities of some answers' response tokens, [answers, tokens]; padded with 0."""
        rows, prompt_lengths = zip(*(self.rows[i] for i in index), strict=True)
        place = split_responses(rows, prompt_lengths, self.trained.engine.device)
        with autocast(self._model):
            logprobs: Tensor = policy(self._entering(index), *place)[0]
        return logprobs

    def read_below(self, batch_size: int, label: str) -> None:
        """Run the frozen layers on all answers, in their order."""
        for part in in_parts(len(self), batch_size, label):
            self._entering(range(len(self))[part])

    def _entering(self, index: Sequence[int]) -> Tensor:
        """Return what enters the layers that train, padded on the right: states, or tokens where all of them do."""
        device = self.trained.engine.device
        if self.trained.top.first is None or not self._keep_states:
            return self._states(index)
        if missing := [i for i in dict.fromkeys(index) if i not in self._kept]:
            for i, row in zip(missing, self._states(missing).cpu(), strict=True):
                self._kept[i] = row[: len(self.rows[i].tokens)].clone()
        return pad_sequence([self._kept[i] for i in index], batch_first=True).to(device)

    @torch.no_grad()
    def _states(self, index: Sequence[int]) -> Tensor:
        with autocast(self._model):
            return entering(self.trained.language, [self.rows[i].tokens for i in index], self.trained.top.first)
