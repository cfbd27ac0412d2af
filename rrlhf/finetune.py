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

from rrlhf.adapters import copies_of
from rrlhf.config import TrunkTraining
from rrlhf.features import distinct, identity
from rrlhf.heads import RewardHeads
from rrlhf.models import autocast, microbatches, run_layers
from rrlhf.objectives import PairLoss
from rrlhf.robust import Scores
from rrlhf.rollout import hidden_states, response_features
from rrlhf.trunk import Encoded, Trunk, by_copy, expanded, lengths
from rrlhf.types import Metrics, Preference

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
            order = sorted(range(len(rows)), key=lambda i: len(rows[i].tokens))
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
            states = hidden_states(self._trunk.language, [self._rows[i].tokens for i in index], self._first)
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
            target_modules=["q_proj", "v_proj"],
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

    weights: [pairs, heads] as in rrlhf.heads.fit. penalty: what each step adds to the loss.
    """
    texts = distinct(pairs)
    number = {name: i for i, name in enumerate(texts)}
    rows = [trunk.encode(*response) for response in texts.values()]
    sides = [[number[identity(pair, pair.chosen)], number[identity(pair, pair.rejected)]] for pair in pairs]
    first = trunk.layer - settings.train_layers
    states = LowerStates(trunk, rows, first, settings.batch_size)
    top = TrunkTop(trunk, heads, first)
    trained = [parameter for parameter in top.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=settings.trunk_learning_rate, weight_decay=0.0, fused=True)
    steps = settings.trunk_epochs * math.ceil(len(pairs) / settings.trunk_pairs_per_batch)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    model, optimizer = engine.prepare(top, optimizer)
    weights, step = weights.to(engine.device), 0
    for _ in range(settings.trunk_epochs):
        order = torch.randperm(len(pairs), generator=generator)
        for index in order.split(settings.trunk_pairs_per_batch):
            batch = sorted(index.tolist(), key=lambda i: max(len(rows[side].tokens) for side in sides[i]))
            counted = weights[index.to(engine.device)].sum(0).clamp(min=1)
            total = torch.zeros((), device=engine.device)
            for part, synchronised in microbatches(engine, model, batch, max(settings.batch_size // 2, 1)):
                with synchronised:
                    both = model(*states.of([sides[i][0] for i in part] + [sides[i][1] for i in part]))
                    chosen, rejected = (Scores(*halves) for halves in zip(*(x.chunk(2) for x in both), strict=True))
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
