"""Reward heads on pooled features of a trunk: one head or K Gaussian heads, trained together.

The trunk is never run here: features are computed once, and a head costs seconds ("Reusing embeddings",
arXiv 2502.04357).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rrlhf.config import Fit
from rrlhf.rewards.posterior import fit as fit_posterior
from rrlhf.rewards.posterior import whiten
from rrlhf.robust import Scores
from rrlhf.stopping import check_stop

WEIGHTS = "heads.safetensors"
SHAPE = "heads.json"
POSTERIOR = ("factor", "origin", "precision")


class Pairs(NamedTuple):
    """Features of preference pairs, one row a pair: [pairs, width], or [pairs, heads, width] for a trunk per head."""

    chosen: Tensor
    rejected: Tensor


class RewardHeads(nn.Module):
    """K heads; each maps features to the mean and log standard deviation of a Gaussian over the reward.

    Features are standardised with the training set's statistics. Scores are normalised per head with the reference
    set's statistics, because a Bradley-Terry reward has no natural zero or scale: no minimum or mixture over heads
    makes sense before that. All statistics are stored with the weights.

    Once `know` was called, the standard deviation of a score is that of the last layer's Laplace posterior
    (posterior.py), and grows where the training pairs end; the one that a head learned itself need not.
    """

    feature_mean: Tensor  # [width], or [heads, width]
    feature_std: Tensor
    score_mean: Tensor  # [heads]
    score_std: Tensor
    # Of each space of last-layer states: one for linear heads on one trunk, else one per head. None before `know`.
    factor: Tensor | None  # [spaces, inner, inner] of the posterior's precision, in units of normalised scores
    origin: Tensor | None  # [spaces, inner] mean state of the reference responses
    precision: Tensor | None  # [spaces] of the prior

    def __init__(self, width: int, heads: int, hidden: int, sigma_floor: float) -> None:
        super().__init__()
        self.shape = {"width": width, "heads": heads, "hidden": hidden, "sigma_floor": sigma_floor}
        inner = hidden or width
        if hidden:
            self.inner = nn.Parameter(torch.randn(heads, width, hidden) * width**-0.5)
        self.outer = nn.Parameter(torch.randn(heads, inner, 2) * (inner + 1) ** -0.5)
        self.bias = nn.Parameter(torch.zeros(heads, 2))
        self.register_buffer("feature_mean", torch.zeros(width))
        self.register_buffer("feature_std", torch.ones(width))
        self.register_buffer("score_mean", torch.zeros(heads))
        self.register_buffer("score_std", torch.ones(heads))
        for name in POSTERIOR:
            self.register_buffer(name, None)

    def forward(self, features: Tensor) -> Scores:
        """Return raw scores [batch, heads], before normalisation, of features [batch, width] or [batch, heads, width].

        With an axis for heads, every head reads the features of a trunk of its own.
        """
        states = self.states(features)
        axes = "bi" if states.dim() == 2 else "bki"
        mean, log_std = (torch.einsum(f"{axes},kio->bko", states, self.outer) + self.bias).unbind(-1)
        return Scores(mean, self.shape["sigma_floor"] + log_std.clamp(max=5.0).exp())

    def states(self, features: Tensor) -> Tensor:
        """Return what the last layer reads, [batch, inner], or [batch, heads, inner] where each head has its own."""
        x = (features - self.feature_mean) / self.feature_std
        if self.shape["hidden"]:
            return torch.einsum("bw,kwh->bkh" if x.dim() == 2 else "bkw,kwh->bkh", x, self.inner).tanh()
        return x

    @torch.no_grad()
    def score(self, features: Tensor) -> Scores:
        """Return normalised scores [batch, heads]: mean 0 and standard deviation 1 on the reference set."""
        features = features.to(self.bias.device)
        raw: Scores = self(features)
        mean = (raw.mean - self.score_mean) / self.score_std
        if self.factor is None or self.origin is None:
            return Scores(mean, raw.std / self.score_std)
        offsets = self.states(features).view(len(features), len(self.factor), -1) - self.origin
        whitened = torch.stack([whiten(*space) for space in zip(self.factor, offsets.unbind(1), strict=True)], dim=1)
        return Scores(mean, whitened.norm(dim=2).expand_as(mean), whitened)

    @torch.no_grad()
    def standardise(self, features: Tensor) -> None:
        """Take the feature statistics from the training set [rows, ..., width], in place."""
        self.feature_mean = features.mean(0).to(self.bias.device)
        self.feature_std = features.std(0).clamp(min=1e-6).to(self.bias.device)

    @torch.no_grad()
    def take(self, score: nn.Linear) -> None:
        """Become, in place, the one linear head that maps features, as they are, to what `score` makes of them."""
        weight, bias = score.weight.float(), 0.0 if score.bias is None else score.bias.float()
        self.outer.zero_()
        self.outer[..., 0] = weight * self.feature_std
        self.bias.zero_()
        self.bias[:, 0] = weight @ self.feature_mean + bias

    @torch.no_grad()
    def normalise(self, features: Tensor) -> None:
        """Take the score statistics from the reference set [rows, width], in place.

        Raises ValueError when a head is constant there: it could not be told from noise afterwards.
        """
        raw: Scores = self(features)
        spread = raw.mean.std(0)
        if (spread < 1e-6).any() or not torch.isfinite(raw.mean).all():
            dead = (~(spread >= 1e-6)).nonzero().flatten().tolist()
            raise ValueError(f"reward heads {dead} give every reference response the same or no finite score")
        self.score_mean.copy_(raw.mean.mean(0))
        self.score_std.copy_(spread)

    @torch.no_grad()
    def know(self, pairs: Pairs, reference: Tensor) -> None:
        """Fit the posterior of the last layer to the training pairs, in place, relative to the reference set.

        It tells how much the pairs say of each direction. Its mode is not the heads' weights, which may be those of a
        bootstrap sample or of another loss. Its sigma is in units of the mode's reward over the reference responses.
        """
        device = self.bias.device
        chosen, rejected, known = (self.states(side.to(device)) for side in (*pairs, reference))
        spaces = [part.unbind(1) if part.dim() == 3 else [part] for part in (chosen - rejected, known)]
        found = []
        for differences, states in zip(*spaces, strict=True):
            posterior = fit_posterior(differences)
            unit = (states.double() @ posterior.mode).std().clamp(min=1e-6)
            found.append((posterior.factor * unit, states.double().mean(0), torch.tensor(posterior.precision)))
        for name, tensors in zip(POSTERIOR, zip(*found, strict=True), strict=True):
            setattr(self, name, torch.stack(tensors).float().to(device))

    def save(self, folder: Path) -> None:
        """Write weights, statistics and shape."""
        save_file({name: tensor.contiguous() for name, tensor in self.state_dict().items()}, folder / WEIGHTS)
        (folder / SHAPE).write_text(json.dumps(self.shape), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> RewardHeads:
        """Read what `save` wrote."""
        heads = cls(**json.loads((folder / SHAPE).read_text(encoding="utf-8")))
        return heads.filled(load_file(folder / WEIGHTS))

    def filled(self, tensors: dict[str, Tensor]) -> RewardHeads:
        """Take weights and statistics, in place, and return itself, ready to score."""
        self.feature_mean = torch.empty_like(tensors["feature_mean"])  # with or without an axis for heads
        self.feature_std = torch.empty_like(tensors["feature_std"])
        for name in POSTERIOR:
            setattr(self, name, torch.empty_like(tensors[name]) if name in tensors else None)
        self.load_state_dict(tensors)
        return self.eval()


def fit(
    heads: RewardHeads,
    loss: Callable[[Scores, Scores, Tensor], Tensor],
    pairs: Pairs,
    weights: Tensor,
    settings: Fit,
    *,
    accelerator: Accelerator,
    generator: torch.Generator,
) -> Iterator[dict[str, float]]:
    """Train all heads in one pass over the features; yield one row of metrics per epoch.

    loss: maps raw scores of chosen and rejected responses and the rows' index to a loss [batch, heads].
    weights: [pairs, heads], how often a head's own sample of the data holds a pair.
    """
    heads.standardise(torch.cat([pairs.chosen, pairs.rejected]))
    optimizer = torch.optim.AdamW(heads.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay)
    model, optimizer = accelerator.prepare(heads, optimizer)
    device = accelerator.device
    pairs, weights = Pairs(*(side.to(device) for side in pairs)), weights.to(device)
    for epoch in range(settings.epochs):
        order = torch.randperm(len(weights), generator=generator).to(device)
        total = torch.zeros((), device=device)
        for index in order.split(settings.pairs_per_batch):
            weight = weights[index]
            error = loss(model(pairs.chosen[index]), model(pairs.rejected[index]), index)
            mean = (error * weight).sum(0) / weight.sum(0).clamp(min=1)  # each head sees only its own loss
            optimizer.zero_grad()
            accelerator.backward(mean.sum())
            optimizer.step()
            total += mean.detach().mean() * len(index)
        yield {"step": epoch + 1, "loss": total.item() / len(weights)}
        check_stop()


def bootstrap_weights(pairs: int, heads: int, generator: torch.Generator) -> Tensor:
    """Return [pairs, heads] counts of a sample with replacement per head (Efron 1979)."""
    drawn = torch.randint(pairs, (pairs, heads), generator=generator)
    return torch.zeros(pairs, heads).scatter_add_(0, drawn, torch.ones(pairs, heads))
