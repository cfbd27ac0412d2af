"""A second opinion on finished policies, of another make than gold: nothing is trained on it.

Where both judges agree, the result does not hang on how gold was built. It is a linear Bradley-Terry model on sentence
embeddings, fitted to the clean held-out pairs, which no policy and no reward model is trained on; it shares neither
features nor noisy labels with the reward models.
"""

import math

import torch
from torch import Tensor

from rrlhf.judging.embeddings import Embedder
from rrlhf.rewards.posterior import fit
from rrlhf.types import Message, Preference

PRECISION = 1000.0  # of the prior on its weights, strong: a few dozen prompts and hundreds of features


class SecondJudge:
    """Scores answers to prompts: 0 is the mean over the held-out pairs' responses, 1 their standard deviation."""

    def __init__(self, pairs: list[Preference]) -> None:
        self._embedder = Embedder()
        prompts = [pair.prompt for pair in pairs]
        chosen = self._features(prompts, [pair.chosen for pair in pairs])
        rejected = self._features(prompts, [pair.rejected for pair in pairs])
        self._weights = fit(chosen - rejected, PRECISION).mode
        known = torch.cat([chosen, rejected]) @ self._weights
        self._mean, self._std = known.mean(), known.std().clamp(min=1e-6)

    def score(self, prompts: list[list[Message]], responses: list[str]) -> Tensor:
        """Return what the judge thinks of each response, [responses]."""
        raw = self._features(prompts, responses) @ self._weights
        standardised: Tensor = (raw - self._mean) / self._std
        return standardised

    def _features(self, prompts: list[list[Message]], responses: list[str]) -> Tensor:
        """Return [responses, 2 * width]: what a response says, and what of it its prompt's last turn says too."""
        asked = [prompt[-1]["content"] for prompt in prompts]
        distinct = list(dict.fromkeys(asked))
        at = torch.tensor([distinct.index(text) for text in asked])
        said = self._embedder.embed(responses).double()
        return torch.cat([said, said * self._embedder.embed(distinct).double()[at]], dim=1) * math.sqrt(said.shape[1])
