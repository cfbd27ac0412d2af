"""Training a trunk together with its reward heads, on preference pairs.

Only the top `train_layers` of the trunk train. The layers below run once; what they leave is kept on the CPU when it
fits. The heads were trained on the frozen trunk before (linear probing, then fine-tuning: Kumar et al. 2022,
arXiv 2202.10054), so the first gradients do not wreck the features.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import psutil
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from rrlhf.config import TrunkTraining
from rrlhf.models.adapters import adapted, merged
from rrlhf.models.load import LanguageModel
from rrlhf.models.processes import microbatches, trained_weights
from rrlhf.models.states import Below
from rrlhf.models.whole import decoder_layers
from rrlhf.rewards.features import distinct, identity
from rrlhf.rewards.heads import RewardHeads
from rrlhf.rewards.objectives import PairLoss
from rrlhf.rewards.trunk import Trunk, lengths
from rrlhf.robust import Scores
from rrlhf.stopping import check_stop
from rrlhf.types import Metrics, Preference

CACHED_SHARE = 0.5  # of the available memory that states of the lower layers may take


class TrunkTop(nn.Module):
    """The layers of a trunk that train, with the heads above them; the trunk's own modules, not copies."""

    def __init__(self, trunk: Trunk, heads: RewardHeads, first: int) -> None:
        super().__init__()
        self.layers = decoder_layers(trunk.language.network)[first : trunk.layer]
        self.heads = heads.to(trunk.language.device)
        self.trunk, self._first = trunk, first

    def forward(self, states: Tensor, prompts: Tensor, texts: Tensor) -> Scores:
        """Return raw scores [rows, heads] of rows, of what enters the layers that train."""
        scores: Scores = self.heads(self.trunk.upper(states, self._first, prompts, texts))
        return scores


@contextmanager
def trainable(trunk: Trunk, settings: TrunkTraining) -> Iterator[None]:
    """Let the trunk's upper layers train, whole or through LoRA, which is merged into the weights at the end."""
    language = let_train(trunk, settings)
    yield
    merged(language).network.requires_grad_(False)


def let_train(trunk: Trunk, settings: TrunkTraining) -> LanguageModel:
    """Let the trunk's upper layers, or adapters in them, train, in place; return the language model with these."""
    layers = range(trunk.layer - settings.train_layers, trunk.layer)
    if settings.trunk == "lora":
        return adapted(trunk.language, layers, settings.lora_rank)
    decoder_layers(trunk.language.network)[layers.start : layers.stop].requires_grad_(True)
    return trunk.language


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
    trained = trained_weights(top)
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
            for (part, _), synchronised in microbatches(
                engine, model, index.tolist(), max(settings.batch_size // 2, 1)
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
    """The responses of preference pairs as rows of tokens, each distinct one once, and what the frozen layers leave.

    That is kept when all of it fits into memory.
    """

    def __init__(self, trunk: Trunk, pairs: list[Preference], settings: TrunkTraining) -> None:
        texts = distinct(pairs)
        number = {name: i for i, name in enumerate(texts)}
        self.first = trunk.layer - settings.train_layers
        self._device = trunk.language.device
        self._rows = [trunk.encode(*response) for response in texts.values()]
        self._sides = [(number[identity(pair, pair.chosen)], number[identity(pair, pair.rejected)]) for pair in pairs]
        tokens = [row.tokens for row in self._rows]
        free = psutil.virtual_memory().available
        fits = 4 * trunk.language.width * sum(map(len, tokens)) <= CACHED_SHARE * free
        self._below = Below(trunk.language, tokens, self.first, trunk.model, keep=fits)

    def scores(self, model: Callable[..., Scores], pairs: list[int]) -> tuple[Scores, Scores]:
        """Return raw scores [pairs, heads] of chosen and rejected responses, from one pass."""
        index = [self._sides[i][side] for side in (0, 1) for i in pairs]
        below = self._below(index)
        states = below.float() if below.is_floating_point() else below
        scores = model(states, *lengths([self._rows[i] for i in index], self._device))
        return scores.of(range(len(pairs))), scores.of(range(len(pairs), len(index)))
