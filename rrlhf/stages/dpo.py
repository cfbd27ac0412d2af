"""A policy from the preferences themselves, without a reward model: direct preference optimisation (DPO).

Rafailov et al. 2023 (arXiv 2305.18290). It learns from the very pairs that reward models are trained on. Only the top
layers train, as in PPO. The reference is the policy before its first step, so its log-probabilities are taken then,
once, and no copy of it is needed.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn

from rrlhf import losses
from rrlhf.config import Dpo, DpoArm, Model
from rrlhf.data.tables import preferences
from rrlhf.judging.calibration import correct
from rrlhf.models.load import load_model, save_model
from rrlhf.models.processes import accelerator, microbatches
from rrlhf.models.shards import loading_device, reads_weights, shares
from rrlhf.models.text import Texts
from rrlhf.policy.answers import Answer, Answers, answer
from rrlhf.policy.checkpoint import Checkpoints
from rrlhf.policy.learner import Trained, top_layers, with_optimizer
from rrlhf.policy.reward import write_arm
from rrlhf.policy.supervision import resumable, shuffled
from rrlhf.progress import track
from rrlhf.stopping import check_stop
from rrlhf.types import Log, Metrics, Preference

MEASURED = ("loss", "accuracy", "margin", "chosen_reward", "rejected_reward")


class Pairs(NamedTuple):
    """Pairs of responses, chosen first; one that stands in several pairs is one answer."""

    answers: Answers
    sides: Tensor  # [pairs, 2] rows of the answers
    reference: Tensor  # [pairs, 2] log-probabilities of the policy before its first step, nats

    def logprobs(self, policy: nn.Module, part: list[int]) -> Tensor:
        """Return a policy's log-probabilities, in nats, of some pairs' responses, [part, 2]."""
        found = self.answers.logprobs(policy, self.sides[part].T.flatten().tolist())
        return found.sum(1).view(2, len(part)).T


def run(*, model: Model, dpo: Dpo, arm: DpoArm, data: Path, sft: Path, out: Path, log: Log) -> None:
    """Train one policy from the SFT model on the preference pairs, and save it; goes on from a checkpoint in `out`."""
    torch.manual_seed(arm.seed)
    engine = accelerator(model)
    language = load_model(sft, model, weights=reads_weights(engine))
    texts = Texts(language, model)
    training, held = (encoded(texts, preferences(data, name)) for name in ("preferences", "heldout"))
    log({"step": 0, **texts.told("dpo")})
    batches = shuffled(len(training), dpo.pairs_per_batch, dpo.epochs, arm.seed)
    top = top_layers(language, loading_device(engine), dpo.train_layers)
    trained = with_optimizer(engine, language, top, dpo.learning_rate, len(batches), eps=1e-8, fused=None)
    pairs, heldout = (prepare_pairs(trained, part, model, dpo) for part in (training, held))
    checkpoints = Checkpoints(out, engine, model=model, dpo=dpo, arm=arm)
    steps = resumable(partial(train, pairs, heldout, batches, dpo), trained, checkpoints, "dpo")
    for row in track(steps, len(batches), "dpo"):
        log(row)
    save_model(language, out)
    if engine.is_main_process:
        write_arm(out, arm)
    engine.wait_for_everyone()


def encoded(texts: Texts, pairs: Sequence[Preference]) -> list[tuple[Answer, Answer]]:
    """Return the chosen and the rejected answer of every pair as tokens, but for pairs that are the same when cut."""
    different = texts.apart(pairs, texts.answer)
    return [(answer(texts, pair.prompt, pair.chosen), answer(texts, pair.prompt, pair.rejected)) for pair in different]


def prepare_pairs(trained: Trained, pairs: Sequence[tuple[Answer, Answer]], model: Model, dpo: Dpo) -> Pairs:
    """Have the reference, which the policy is before its first step, read all pairs."""
    rows = list(dict.fromkeys(row for pair in pairs for row in pair))
    number = {row: i for i, row in enumerate(rows)}
    sides = torch.tensor([[number[row] for row in pair] for pair in pairs])
    answers = Answers(trained, rows, model, keep_states=dpo.keep_states)
    if trained.top.first is not None and dpo.keep_states and trained.engine.num_processes > 1:
        answers.read_below(2 * dpo.microbatch_size, "dpo: frozen layers")  # all processes run them equally often
    return Pairs(answers, sides, _logprobs(answers, dpo, "dpo: reference")[sides])


@torch.no_grad()
def _logprobs(answers: Answers, dpo: Dpo, label: str) -> Tensor:
    """Return the present policy's log-probabilities of all answers, [answers]; every process takes its share."""
    engine, size = answers.trained.engine, 2 * dpo.microbatch_size
    by_length = sorted(range(len(answers)), key=lambda i: len(answers.rows[i].tokens))
    parts = shares(engine, by_length, size)
    found: list[tuple[int, float]] = []
    for part, counts in track(parts, len(parts), label):
        told = answers.logprobs(answers.trained.top, part).sum(1).tolist()
        found += zip(part, told, strict=True) if counts else ()
        check_stop()
    everyone = dict(gather_object(found))
    return torch.tensor([everyone[i] for i in range(len(answers))], device=engine.device)


def train(pairs: Pairs, heldout: Pairs, batches: list[list[int]], dpo: Dpo, first: int = 0) -> Iterator[Metrics]:
    """Minimise the loss, from batch `first` on; yield metrics after every step, with an epoch's last of held-out pairs.

    Every process takes its share of each batch, and the gradient is the mean over all pairs of the batch, so the
    number of processes changes nothing but rounding.
    """
    trained = pairs.answers.trained
    for step, batch in enumerate(batches[first:], first + 1):
        rate = float(trained.schedule.get_last_lr()[0])
        metrics = _step(trained, pairs, batch, dpo)
        if step % (len(batches) // dpo.epochs) == 0:
            told = _logprobs(heldout.answers, dpo, "dpo: held-out pairs")[heldout.sides]
            log_ratio = told - heldout.reference
            means = (_measured(log_ratio, _losses(log_ratio, dpo), dpo) / len(log_ratio)).tolist()
            metrics |= {f"heldout_{name}": mean for name, mean in zip(MEASURED, means, strict=True)}
        yield {"step": step, **metrics, "learning_rate": rate}


def _step(trained: Trained, pairs: Pairs, batch: list[int], dpo: Dpo) -> Metrics:
    """Take one optimizer step on a batch of pairs; return the means over them, of all processes."""
    engine = trained.engine
    total = torch.zeros(len(MEASURED), dtype=torch.float64)
    for (part, counts), synchronised in microbatches(engine, trained.policy, batch, dpo.microbatch_size):
        with synchronised:
            log_ratio = pairs.logprobs(trained.policy, part) - pairs.reference[part]
            loss = _losses(log_ratio, dpo)
            # Data parallelism averages over processes.
            engine.backward(loss.sum() * counts * engine.num_processes / len(batch))
        total += _measured(log_ratio.detach(), loss.detach(), dpo) * counts / len(batch)
    norm = trained.step(dpo.max_grad_norm)
    means = engine.reduce(total.float().to(engine.device), reduction="sum").tolist()
    return dict(zip(MEASURED, means, strict=True)) | {"gradient_norm": norm}


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
