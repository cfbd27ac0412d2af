"""Training a trunk together with its reward heads, on preference pairs.

Only the top `train_layers` of the trunk train. The layers below run once; what they leave is kept on the CPU when it
fits. The heads were trained on the frozen trunk before (linear probing, then fine-tuning: Kumar et al. 2022,
arXiv 2202.10054), so the first gradients do not wreck the features.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from rrlhf.config import TrunkTraining
from rrlhf.models.adapters import MAPS, copies_of
from rrlhf.models.layers import hidden_states, run_layers
from rrlhf.models.load import autocast, microbatches
from rrlhf.models.rollout import response_features
from rrlhf.rewards.features import distinct, identity
from rrlhf.rewards.heads import RewardHeads
from rrlhf.rewards.objectives import PairLoss
from rrlhf.rewards.trunk import Encoded, Trunk, alike, by_copy, expanded, lengths
from rrlhf.robust import Scores
from rrlhf.stopping import check_stop
from rrlhf.types import Metrics, Preference

ROWS_TOGETHER = 8  # responses in one pass on a CPU: more only adds padding there
CACHED_SHARE = 0.5  # of the free memory that states of the lower layers may take


class TrunkTop(nn.Module):
    """The layers of a trunk that train, with the heads above them; the trunk's own modules, not copies."""

    def __init__(self, trunk: Trunk, heads: RewardHeads, first: int) -> None:
        super().__init__()
        self.layers = trunk.language.network.model.layers[first : trunk.layer]
        self.heads = heads.to(trunk.language.device)
        self._trunk, self._first, self._copies = trunk, first, copies_of(trunk.language.network)

    def forward(self, states: Tensor, prompts: Tensor, texts: Tensor) -> Scores:
        """Return raw scores [rows, heads] of states [rows, tokens, width] that the frozen layers left."""
        network = self._trunk.language.network
        with autocast(self._trunk.model):
            hidden = run_layers(network, expanded(states, self._copies), self._first, self._trunk.layer)
        pooled = response_features(hidden, prompts.repeat(self._copies), texts.repeat(self._copies))
        scores: Scores = self.heads(by_copy(pooled, self._copies))
        return scores


class LowerStates:
    """What the layers below `first` leave for each row, [tokens, width]: computed once when all of it fits."""

    def __init__(self, trunk: Trunk, rows: Sequence[Encoded], first: int, batch_size: int) -> None:
        self._trunk, self._rows, self._first = trunk, rows, first
        width = trunk.language.network.config.hidden_size
        needed = 4 * width * sum(len(row.tokens) for row in rows)
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        self._kept: dict[int, Tensor] = {}
        if needed <= CACHED_SHARE * free:
            order = alike(rows)
            for start in range(0, len(order), batch_size):
                part = order[start : start + batch_size]
                states = self._computed(part).cpu()
                self._kept |= {i: row[: len(rows[i].tokens)].clone() for i, row in zip(part, states, strict=True)}

    def of(self, index: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Return the states of some rows, padded on the right, with the lengths of their prompts and texts."""
        device = self._trunk.language.device
        if self._kept:
            states = pad_sequence([self._kept[i] for i in index], batch_first=True).to(device)
        else:
            states = self._computed(index)
        return states, *lengths([self._rows[i] for i in index], device)

    def _computed(self, index: Sequence[int]) -> Tensor:
        with autocast(self._trunk.model):
            states = hidden_states(self._trunk.language.network, [self._rows[i].tokens for i in index], self._first)
        return states.float()


@contextmanager
def trainable(trunk: Trunk, settings: TrunkTraining) -> Iterator[None]:
    """Let the trunk's upper layers train, whole or through LoRA, which is merged into the weights at the end."""
    network, layers = trunk.language.network, range(trunk.layer - settings.train_layers, trunk.layer)
    adapted: Any = None
    if settings.trunk == "lora":
        from peft import LoraConfig, LoraModel

        config = LoraConfig(
            r=settings.lora_rank,
            lora_alpha=settings.lora_rank,
            target_modules=list(MAPS),
            layers_to_transform=list(layers),
            layers_pattern="layers",
        )
        adapted = LoraModel(network, config, "default")
    else:
        network.model.layers[layers.start : layers.stop].requires_grad_(True)
    yield
    if adapted:
        adapted.merge_and_unload()
    network.requires_grad_(False)


def finetune(
    trunk: Trunk,
    heads: RewardHeads,
    loss: PairLoss,
    pairs: list[Preference],
    weights: Tensor,
    settings: TrunkTraining,
    *,
    engine: Accelerator,
    generator: torch.Generator,
    penalty: Callable[[], Tensor] | None = None,
) -> Iterator[Metrics]:
    """Train what is trainable in the trunk, and the heads, in place; yield metrics after every optimizer step.

    weights: [pairs, heads] as in rrlhf.rewards.heads.fit. penalty: what each step adds to the loss.
    """
    responses = PairedResponses(trunk, pairs, settings)
    top = TrunkTop(trunk, heads, responses.first)
    trained = [parameter for parameter in top.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=settings.trunk_learning_rate, weight_decay=0.0, fused=True)
    steps = settings.trunk_epochs * math.ceil(len(pairs) / settings.trunk_pairs_per_batch)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    model, optimizer = engine.prepare(top, optimizer)
    weights, step = weights.to(engine.device), 0
    for _ in range(settings.trunk_epochs):
        order = torch.randperm(len(pairs), generator=generator)
        for index in order.split(settings.trunk_pairs_per_batch):
            counted = weights[index.to(engine.device)].sum(0).clamp(min=1)
            total = torch.zeros((), device=engine.device)
            for part, synchronised in microbatches(
                engine, model, responses.by_length(index.tolist()), max(settings.batch_size // 2, 1)
            ):
                with synchronised:
                    chosen, rejected = responses.scores(model, part)
                    here = torch.tensor(part, device=engine.device)
                    share = ((loss(chosen, rejected, here) * weights[here]).sum(0) / counted).sum()
                    engine.backward(share)
                total += share.detach() / weights.shape[1]
            extra = penalty() if penalty else None
            if extra is not None:
                engine.backward(extra)
            norm = engine.clip_grad_norm_(trained, settings.trunk_max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            step += 1
            row = {"step": step, "trunk_loss": total.item(), "trunk_gradient_norm": float(norm)}
            yield row | ({} if extra is None else {"penalty": extra.item()})
            check_stop()


class PairedResponses:
    """The responses of preference pairs as token rows, each distinct one once, and what the frozen layers leave."""

    def __init__(self, trunk: Trunk, pairs: list[Preference], settings: TrunkTraining) -> None:
        texts = distinct(pairs)
        number = {name: i for i, name in enumerate(texts)}
        self.first = trunk.layer - settings.train_layers
        self._rows = [trunk.encode(*response) for response in texts.values()]
        self._sides = [(number[identity(pair, pair.chosen)], number[identity(pair, pair.rejected)]) for pair in pairs]
        self._states = LowerStates(trunk, self._rows, self.first, settings.batch_size)
        self._together = ROWS_TOGETHER if trunk.language.device.type == "cpu" else settings.batch_size

    def by_length(self, pairs: list[int]) -> list[int]:
        """Order pairs by their longer response."""
        return sorted(pairs, key=lambda i: max(self._length(side) for side in self._sides[i]))

    def scores(self, model: Callable[..., Scores], pairs: list[int]) -> tuple[Scores, Scores]:
        """Return raw scores [pairs, heads] of chosen and rejected responses.

        All of them share one graph, but responses of similar length run together, whichever pair they are of: a
        pair's two lengths differ, and padding costs as much as text.
        """
        index = [self._sides[i][side] for side in (0, 1) for i in pairs]
        order = sorted(range(len(index)), key=lambda at: self._length(index[at]))
        parts = [order[i : i + self._together] for i in range(0, len(order), self._together)]
        found = [model(*self._states.of([index[at] for at in part])) for part in parts]
        scores, back = _joined(found), torch.tensor(order).argsort().tolist()
        return scores.of(back[: len(pairs)]), scores.of(back[len(pairs) :])

    def _length(self, row: int) -> int:
        return len(self._rows[row].tokens)


def _joined(parts: Sequence[Scores]) -> Scores:
    """Return the scores of several batches as those of one."""
    offsets = [part.offset for part in parts if part.offset is not None]
    mean, std = torch.cat([part.mean for part in parts]), torch.cat([part.std for part in parts])
    return Scores(mean, std, torch.cat(offsets) if offsets else None)
