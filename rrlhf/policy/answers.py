"""Given responses, of demonstrations or preference pairs, as the layers that train read them."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn

from rrlhf.config import Model
from rrlhf.models.processes import autocast, in_parts
from rrlhf.models.states import Below
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
        self.rows, self.trained, self._model = rows, trained, model
        tokens = [row.tokens for row in rows]
        self._below = Below(trained.language, tokens, trained.top.first, model, keep=keep_states)

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
            logprobs: Tensor = policy(self._below(index), *place)[0]
        return logprobs

    def read_below(self, batch_size: int, label: str) -> None:
        """Run the frozen layers on all answers, in their order."""
        for part in in_parts(len(self), batch_size, label):
            self._below(range(len(self))[part])
