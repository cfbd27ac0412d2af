"""A policy from the preferences themselves, without a reward model: direct preference optimisation (DPO).

Rafailov et al. 2023 (arXiv 2305.18290). It learns from the very pairs that reward models are trained on. Only the top
layers train, as in PPO: what the frozen layers below leave of a response is the same in every epoch. The reference is
the policy before its first step, so its log-probabilities are taken then, once, and no copy of it is needed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from rrlhf import losses
from rrlhf.config import Arm, Dpo, Model
from rrlhf.data.tables import preferences
from rrlhf.judging.calibration import correct
from rrlhf.models.layers import hidden_states
from rrlhf.models.load import LanguageModel, accelerator, autocast, load_model, microbatches, save_model
from rrlhf.models.text import Texts
from rrlhf.models.top import PolicyTop, first_trained, split_responses
from rrlhf.policy.arm_record import write_arm
from rrlhf.policy.checkpoint import Trained
from rrlhf.policy.steps import shuffled, take_steps
from rrlhf.progress import track
from rrlhf.types import Log, Message, Metrics, Preference

MEASURED = ("loss", "accuracy", "margin", "chosen_reward", "rejected_reward")


class Answer(NamedTuple):
    """Tokens of a prompt with one response."""

    tokens: tuple[int, ...]
    prompt_length: int


@dataclass
class Learner:
    """The policy while it trains."""

    engine: Accelerator
    language: LanguageModel
    top: PolicyTop
    policy: nn.Module  # `top`, wrapped for data parallelism
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    boundary: int  # layers below it are frozen


def run(*, model: Model, dpo: Dpo, arm: Arm, data: Path, sft: Path, out: Path, log: Log) -> None:
    """Train one policy from the SFT model on the preference pairs, and save it; goes on from a checkpoint in `out`."""
    torch.manual_seed(arm.seed)
    engine, language = accelerator(model), load_model(sft)
    texts = Texts(language, model)
    training, held = (encoded(texts, preferences(data, name)) for name in ("preferences", "heldout"))
    log({"step": 0, **texts.told("dpo")})
    steps = dpo.epochs * math.ceil(len(training) / dpo.pairs_per_batch)
    learner = prepare_learner(engine, language, dpo, steps)
    pairs, heldout = (Pairs(learner, answers, model, dpo, "dpo: reference") for answers in (training, held))
    train(learner, pairs, heldout, model, dpo, arm, out, log)
    if engine.is_main_process:
        save_model(language, out)
        write_arm(out, arm)
    engine.wait_for_everyone()


def encoded(texts: Texts, pairs: Sequence[Preference]) -> list[tuple[Answer, Answer]]:
    """Return the chosen and the rejected answer of every pair as tokens, but for pairs that are the same when cut."""

    def answer(prompt: list[Message], response: str) -> Answer:
        asked = texts.prompt(prompt)
        return Answer((*asked, *texts.answer(response)), len(asked))

    different = texts.apart(pairs, texts.answer)
    return [(answer(pair.prompt, pair.chosen), answer(pair.prompt, pair.rejected)) for pair in different]


def prepare_learner(engine: Accelerator, language: LanguageModel, dpo: Dpo, steps: int) -> Learner:
    """Freeze what does not train and build the optimizer, whose learning rate is 0 after `steps`.

    Raises ValueError when the model has fewer layers than are to train.
    """
    first = first_trained(language, dpo.train_layers, "dpo.train_layers")
    language.network.requires_grad_(False).to(engine.device)
    top = PolicyTop(language, first)
    top.value.requires_grad_(False)  # PPO's
    for part in (top.layers, top.norm):
        part.requires_grad_(True)
    trained = [parameter for parameter in top.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=dpo.learning_rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    policy, optimizer = engine.prepare(top, optimizer)
    return Learner(engine, language, top, policy, optimizer, schedule, first)


class Pairs:
    """Pairs of responses as the top layers read them, with the reference's log-probabilities [pairs, 2], chosen first.

    Made before the first step, when the policy is the reference. A response that stands in several pairs is one answer:
    the frozen layers and the reference read it once.
    """

    def __init__(
        self, learner: Learner, pairs: Sequence[tuple[Answer, Answer]], model: Model, dpo: Dpo, label: str
    ) -> None:
        self._learner, self._model, self._dpo = learner, model, dpo
        self._answers = list(dict.fromkeys(answer for pair in pairs for answer in pair))
        number = {answer: i for i, answer in enumerate(self._answers)}
        self._index = torch.tensor([[number[answer] for answer in pair] for pair in pairs])  # [pairs, 2]
        self._kept: dict[int, Tensor] = {}  # by answer: states that enter the top layers, [tokens, width] on the CPU
        self.reference = self.logprobs(label)

    def __len__(self) -> int:
        return len(self._index)

    @torch.no_grad()
    def logprobs(self, label: str) -> Tensor:
        """Return the present policy's log-probabilities of all pairs, [pairs, 2]; every process takes its share."""
        engine, size = self._learner.engine, 2 * self._dpo.microbatch_size
        by_length = sorted(range(len(self._answers)), key=lambda i: len(self._answers[i].tokens))
        mine = by_length[engine.process_index :: engine.num_processes]
        parts = [mine[i : i + size] for i in range(0, len(mine), size)]
        found: list[tuple[int, float]] = []
        for part in track(parts, len(parts), label):
            found += zip(part, self._read(self._learner.top, part).tolist(), strict=True)
        everyone = dict(gather_object(found))
        told = torch.tensor([everyone[i] for i in range(len(self._answers))], device=engine.device)
        return told[self._index]

    def read(self, policy: nn.Module, part: list[int]) -> Tensor:
        """Return a policy's log-probabilities, in nats, of some pairs' responses, [part, 2]."""
        return self._read(policy, self._index[part].T.flatten().tolist()).view(2, len(part)).T

    def _read(self, policy: nn.Module, index: list[int]) -> Tensor:
        """Return a policy's log-probabilities of some answers, [answers]."""
        rows, prompt_lengths = zip(*(self._answers[i] for i in index), strict=True)
        place = split_responses(rows, prompt_lengths, self._learner.engine.device)
        with autocast(self._model):
            logprobs, _ = policy(self._states(index), *place)
        total: Tensor = logprobs.sum(1)
        return total

    def _states(self, index: list[int]) -> Tensor:
        """Return what enters the top layers for some answers, padded on the right, [answers, tokens, width]."""
        missing = [i for i in dict.fromkeys(index) if i not in self._kept]
        if missing and not self._dpo.keep_states:
            return self._computed(index)
        if missing:
            for i, row in zip(missing, self._computed(missing).cpu(), strict=True):
                self._kept[i] = row[: len(self._answers[i].tokens)].clone()
        return pad_sequence([self._kept[i] for i in index], batch_first=True).to(self._learner.engine.device)

    @torch.no_grad()
    def _computed(self, index: list[int]) -> Tensor:
        with autocast(self._model):
            tokens = [list(self._answers[i].tokens) for i in index]
            return hidden_states(self._learner.language.network, tokens, self._learner.boundary)


def train(
    learner: Learner, pairs: Pairs, heldout: Pairs, model: Model, dpo: Dpo, arm: Arm, out: Path, log: Log
) -> None:
    """Minimise the loss; log metrics after every optimizer step, with an epoch's last those of held-out pairs.

    Every process takes its share of each batch, and the gradient is the mean over all pairs of the batch, so the
    number of processes changes nothing but rounding. Goes on from the checkpoint in `out`, if there is one.
    """
    batches = shuffled(len(pairs), dpo.pairs_per_batch, dpo.epochs, arm.seed)
    per_epoch = len(batches) // dpo.epochs

    def step(number: int) -> Metrics:
        rate = float(learner.schedule.get_last_lr()[0])
        metrics = _step(learner, pairs, batches[number], dpo)
        learner.schedule.step()
        if (number + 1) % per_epoch == 0:
            log_ratio = heldout.logprobs("dpo: held-out pairs") - heldout.reference
            means = (_measured(log_ratio, _losses(log_ratio, dpo), dpo) / len(heldout)).tolist()
            metrics |= {f"heldout_{name}": mean for name, mean in zip(MEASURED, means, strict=True)}
        return {"step": number + 1, **metrics, "learning_rate": rate}

    made_for = {name: part.model_dump() for name, part in {"model": model, "dpo": dpo, "arm": arm}.items()}
    trained = Trained(learner.top, learner.optimizer, learner.schedule)
    take_steps(learner.engine, trained, step, len(batches), label="dpo", log=log, out=out, made_for=made_for)


def _step(learner: Learner, pairs: Pairs, batch: list[int], dpo: Dpo) -> Metrics:
    """Take one optimizer step on a batch of pairs; return the means over them, of all processes."""
    engine = learner.engine
    mine = batch[engine.process_index :: engine.num_processes]
    total = torch.zeros(len(MEASURED), dtype=torch.float64)
    for part, synchronised in microbatches(engine, learner.policy, mine or batch[:1], dpo.microbatch_size):
        with synchronised:
            log_ratio = pairs.read(learner.policy, part) - pairs.reference[part]
            loss = _losses(log_ratio, dpo)
            # A process without a pair goes along; data parallelism averages over processes.
            engine.backward(loss.sum() * bool(mine) * engine.num_processes / len(batch))
        total += _measured(log_ratio.detach(), loss.detach(), dpo) * bool(mine) / len(batch)
    norm = engine.clip_grad_norm_(learner.policy.parameters(), dpo.max_grad_norm)
    learner.optimizer.step()
    learner.optimizer.zero_grad()
    means = engine.reduce(total.float().to(engine.device), reduction="sum").tolist()
    return dict(zip(MEASURED, means, strict=True)) | {"gradient_norm": float(norm)}


def _losses(log_ratio: Tensor, dpo: Dpo) -> Tensor:
    """Return the loss [pairs] of log(pi / pi_ref) [pairs, 2]."""
    chosen, rejected = log_ratio.unbind(1)
    if dpo.loss == "ipo":
        return losses.ipo(chosen, rejected, dpo.beta)
    return losses.dpo(chosen, rejected, dpo.beta, dpo.label_smoothing)


def _measured(log_ratio: Tensor, loss: Tensor, dpo: Dpo) -> Tensor:
    """Return the sums over pairs of MEASURED; the implicit reward of a response is beta * log(pi / pi_ref)."""
    chosen, rejected = (dpo.beta * log_ratio.double()).unbind(1)
    margin = chosen - rejected
    return torch.stack([part.double().sum() for part in (loss, correct(margin), margin, chosen, rejected)]).cpu()
