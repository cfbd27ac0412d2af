"""Stage 5: proximal policy optimisation against one reward head or the robust ensemble (Schulman et al. 2017).

An update samples a rollout, scores it, and takes a few optimizer steps on it. What trains and what is frozen stands
in rrlhf/policy/learner.py; what is done when training goes wrong, in rrlhf/policy/guard.py.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from rrlhf.advantages import estimate, has_critic
from rrlhf.config import Arm, Health, Model, Ppo
from rrlhf.data.tables import columns_of, further_columns, read_table
from rrlhf.environment import give_back_memory
from rrlhf.files import CHECKPOINT
from rrlhf.kl import ESTIMATORS, adapted_weight
from rrlhf.losses import approximate_kl, clipped_policy_loss, clipped_value_loss
from rrlhf.models.adapters import merge_adapters
from rrlhf.models.load import accelerator, accumulated, autocast, load_model, save_model
from rrlhf.models.rollout import Rollout, Samples, explained_variance, rollout_metrics, tokens_of
from rrlhf.models.text import Texts, decode
from rrlhf.policy.arm_record import Scale, write_arm
from rrlhf.policy.checkpoint import Checkpoints
from rrlhf.policy.excerpts import FILE as EXCERPTS
from rrlhf.policy.excerpts import excerpts
from rrlhf.policy.guard import Guard
from rrlhf.policy.health import EVENTS, DivergedError
from rrlhf.policy.judgement import Judgement, arm_reward, judge, reference_scale, reward_metrics
from rrlhf.policy.learner import Course, Learner, Sampled, clip_gradients, prepare_learner, resume
from rrlhf.policy.reward_functions import NO_COLUMNS, Columns, load_functions
from rrlhf.progress import Interrupted, track
from rrlhf.returns import masked_mean, token_rewards
from rrlhf.types import Log, Message, Metrics


def run(
    *,
    model: Model,
    ppo: Ppo,
    health: Health,
    arm: Arm,
    data: Path,
    sft: Path,
    reward: Path,
    ensemble: Path,
    out: Path,
    log: Log,
) -> None:
    """Train one arm's policy from the SFT model and save it with the responses it gave on the way.

    Goes on from the checkpoint in `out`, if there is one, and then logs the rows before it again. Raises DivergedError
    when the training went wrong and rolling back did not help; then only what tells of it is left in `out`.
    """
    torch.manual_seed(arm.seed)
    engine = accelerator(model)
    rows = read_table(data, "ppo")
    asked, columns = [row["prompt"] for row in rows], columns_of(rows)
    functions = load_functions(arm.functions, further_columns(data))
    scale = reference_scale(arm, reward, ensemble)
    learner = prepare_learner(engine, load_model(sft), ppo, arm.seed, reward, ensemble, functions)
    texts = Texts(learner.language, model)
    encoded = [texts.prompt(prompt) for prompt in asked]
    cut = texts.told("ppo")
    made_for = {
        name: part.model_dump() for name, part in {"model": model, "ppo": ppo, "health": health, "arm": arm}.items()
    }
    label = f"ppo ({arm.reward})"
    with Checkpoints(out / CHECKPOINT, engine, made_for) as checkpoints:
        course = resume(learner, checkpoints.newest())
        guard = Guard(learner, course, checkpoints, health, label)
        before = list(course.rows)
        paid = arm_reward(arm, engine, scale)
        steps = train(learner, encoded, paid, model, ppo, arm.seed, course, asked, guard, columns)
        try:
            for row in track(chain(before, steps), ppo.updates, label):
                log(cut | row)
        except Interrupted:
            guard.interrupted()
            raise
        except DivergedError:
            _tell(engine, course, asked, out)
            raise
        kept = _tell(engine, course, asked, out)
        _save(learner, kept, arm, scale, out)


def _tell(engine: Accelerator, course: Course, asked: Sequence[list[Message]], out: Path) -> list[Sampled]:
    """Write what health saw and some of what the policy wrote; return all processes' responses by update."""
    kept = sorted(gather_object(course.kept), key=lambda row: row.update)
    if engine.is_main_process:
        events = [event._asdict() for event in course.events]
        for name, told in ((EVENTS, events), (EXCERPTS, excerpts(kept, asked))):
            (out / name).write_text(json.dumps(told, indent=1, ensure_ascii=False), encoding="utf-8")
    return kept


def _save(learner: Learner, kept: list[Sampled], arm: Arm, scale: Scale, out: Path) -> None:
    if learner.engine.is_main_process:
        merge_adapters(learner.language.network)
        save_model(learner.language, out)
        pq.write_table(pa.Table.from_pylist([row._asdict() for row in kept]), out / "rollouts.parquet")
        write_arm(out, arm, scale)
    learner.engine.wait_for_everyone()


def train(
    learner: Learner,
    encoded: list[list[int]],
    reward: Callable[[Judgement], Tensor],
    model: Model,
    ppo: Ppo,
    seed: int,
    course: Course,
    asked: Sequence[list[Message]] = (),
    guard: Guard | None = None,
    columns: Columns = NO_COLUMNS,
) -> Iterator[Metrics]:
    """Alternate rollouts and optimisation; yield one row of metrics per rollout.

    encoded: the prompts' tokens; asked: the same prompts as text, for reward models with a trunk of their own. course:
    what lies behind the learner, to which its rows and responses are added. columns: of the data, a value a prompt, for
    reward functions. Ends before `ppo.updates` with the first rollout whose KL is above `ppo.max_kl`, and does not
    train on it. Raises DivergedError as `guard` says.
    """
    cursor = islice(_endless(len(encoded), seed), course.step * ppo.prompts_per_update, None)
    rank, processes = learner.engine.process_index, learner.engine.num_processes
    if guard:
        guard.begin()
    while course.update < ppo.updates and not (course.rows and course.rows[-1].get("kl_budget_exceeded")):
        began = time.perf_counter()
        batch = [next(cursor) for _ in range(ppo.prompts_per_update)][rank::processes]
        batch = [i for i in batch for _ in range(ppo.responses_per_prompt)]
        texts = [asked[i] for i in batch] if asked else []
        told = {name: [values[i] for i in batch] for name, values in columns.items()}
        tokens = [encoded[i] for i in batch]
        rollout, judgement, sampled, metrics = collect(learner, tokens, reward, model, ppo, texts, told)
        course.kept += _kept(learner, course.step, batch, rollout, judgement, sampled)
        metrics = mean_over_processes(learner.engine, metrics)
        if ppo.max_kl is not None:
            metrics["kl_budget_exceeded"] = float(metrics["kl"] > ppo.max_kl)
        if not metrics.get("kl_budget_exceeded"):
            metrics |= optimise(learner, rollout, model, ppo)
            if metrics["optimizer_steps"]:
                learner.schedule.step()
            learner.kl_weight = _adapted(learner.kl_weight, metrics["kl"], ppo)
        metrics["tokens_per_second"] = rollout.mask.sum().item() * processes / (time.perf_counter() - began)
        course.rows.append({"step": course.step, **metrics})
        course.update += 1
        row, diverged = course.rows[-1], guard.look() if guard else None
        yield row
        if diverged:
            raise DivergedError(diverged)


def _kept(
    learner: Learner, step: int, batch: list[int], rollout: Rollout, judgement: Judgement, sampled: Samples
) -> list[Sampled]:
    """Return the rollout's responses as they are kept."""
    columns = (
        batch,
        [decode(learner.language, row) for row in sampled.lists()],
        sampled.finished.tolist(),
        (rollout.logprobs - rollout.reference_logprobs).sum(1).tolist(),
        judgement.single.tolist(),
        judgement.ensemble.mean.tolist(),
        judgement.ensemble.std.mean(1).tolist(),
    )
    return [Sampled(step, *row) for row in zip(*columns, strict=True)]


@torch.no_grad()
def collect(
    learner: Learner,
    batch: list[list[int]],
    reward: Callable[[Judgement], Tensor],
    model: Model,
    ppo: Ppo,
    asked: Sequence[list[Message]] = (),
    columns: Columns = NO_COLUMNS,
) -> tuple[Rollout, Judgement, Samples, Metrics]:
    """Sample responses, judge them, and turn scores into advantages."""
    boundary, layer = learner.boundary, learner.reward_layer
    elsewhere = None if learner.shares_trunk else layer  # the reference's pass gives the reward heads' states
    with autocast(model):
        samples = learner.sample(batch, model.response_tokens)
        longest = int((samples.prompt_lengths + samples.mask.sum(1)).max())
        entering = tokens_of(batch, samples) if boundary is None else samples.states[boundary][:, :longest]
        place = (entering, samples.prompt_lengths, samples.responses, samples.mask)
        old_logprobs, values = samples.logprobs, learner.top.value(samples.top).float().squeeze(-1)
        tokens = min(ppo.microbatch_tokens, ppo.minibatch_size * longest)  # takes no more memory than an update's step
        reference = learner.reference(*place, layer=elsewhere, tokens=tokens)
        if torch.is_autocast_enabled(learner.engine.device.type):  # bfloat16: one row alone rounds differently
            old_logprobs, values, _ = learner.top.read(*place, tokens=tokens)
    judgement = judge(
        samples,
        learner.single,
        learner.ensemble,
        states=samples.states[layer] if layer is not None and learner.shares_trunk else reference.states,
        language=learner.language,
        asked=asked,
        functions=learner.functions,
        columns=columns,
        microbatch_size=max(ppo.microbatch_tokens // (model.prompt_tokens + model.response_tokens), 1),
    )
    score = torch.where(samples.finished, reward(judgement), ppo.missing_eos_score)
    mask = samples.mask
    log_ratio = (old_logprobs - reference.logprobs) * mask
    values = values * mask if has_critic(ppo) else torch.zeros_like(values)
    kl_cost = learner.kl_weight if ppo.kl_in == "reward" else 0.0
    rewards = token_rewards(score, ESTIMATORS[ppo.kl_estimator](log_ratio), mask, kl_cost)
    advantages, returns = estimate(learner.engine, ppo, rewards, values, mask)
    rollout = Rollout(
        entering=entering,
        prompt_lengths=samples.prompt_lengths,
        responses=samples.responses,
        mask=mask,
        logprobs=old_logprobs * mask,
        reference_logprobs=reference.logprobs * mask,
        values=values,
        advantages=advantages,
        returns=returns,
    )
    cut = [found for reward_model in (learner.single, learner.ensemble) for found in reward_model.cut.values()]
    metrics = {
        **({"cut_responses": max(cut)} if cut else {}),
        "score": score.mean().item(),
        "score_std": score.std(correction=0).item(),
        "kl_weight": learner.kl_weight,
        **reward_metrics(judgement),
        **rollout_metrics(rollout, samples),
    }
    if has_critic(ppo):
        metrics["explained_variance"] = explained_variance(rollout)
    return rollout, judgement, samples, metrics


def optimise(learner: Learner, rollout: Rollout, model: Model, ppo: Ppo) -> Metrics:
    """Take the update's optimizer steps on one rollout; return the means over them.

    A step whose gradient is not finite is left out and counted in `skipped_steps`.
    """
    size = ppo.minibatch_size // learner.engine.num_processes
    rows: list[Metrics] = []
    skipped = 0
    for _ in range(ppo.epochs):
        order = torch.randperm(len(rollout.mask), generator=learner.shuffle).to(rollout.mask.device)
        steps = [_step(learner, rollout.rows(index), model, ppo) for index in order.split(size)]
        taken = [step for step in steps if step is not None]
        rows += taken
        skipped += len(steps) - len(taken)
        if taken and mean_over_processes(learner.engine, taken[-1])["step_kl"] > ppo.max_step_kl:
            break
    give_back_memory()
    means: Metrics = {name: sum(row[name] for row in rows) / len(rows) for name in (rows[0] if rows else ())}
    counts = {"optimizer_steps": len(rows), "skipped_steps": skipped}
    rate = float(learner.optimizer.param_groups[0]["lr"])
    return mean_over_processes(learner.engine, means) | counts | {"learning_rate": rate}


def _step(learner: Learner, rollout: Rollout, model: Model, ppo: Ppo) -> Metrics | None:
    """Take one optimizer step; None if its gradient was not finite and nothing was done."""
    shares: list[dict[str, Tensor]] = []
    tokens = rollout.mask.sum()
    parts = rollout.packed(ppo.microbatch_tokens)
    for index, synchronised in accumulated(learner.engine, learner.policy, parts):
        with synchronised:
            shares.append(_accumulate(learner, rollout.rows(index), tokens, model, ppo))
    norm = clip_gradients(learner, ppo.max_grad_norm)
    is_finite = norm < float("inf")  # false for nan as well; the same in all processes, which share their gradients
    if is_finite:
        learner.optimizer.step()
    learner.optimizer.zero_grad()
    if not is_finite:
        return None
    totals = torch.stack([torch.stack(list(share.values())) for share in shares]).sum(0).tolist()
    return dict(zip(shares[0], totals, strict=True)) | {"gradient_norm": norm}


def _accumulate(learner: Learner, part: Rollout, tokens: Tensor, model: Model, ppo: Ppo) -> dict[str, Tensor]:
    """Add a part's share of the minibatch's gradient; return its share of the minibatch's means over `tokens`."""
    share = part.mask.sum() / tokens
    with autocast(model):
        logprobs, values = learner.policy(part.entering, part.prompt_lengths, part.responses, part.mask)
    log_ratio = (logprobs - part.logprobs) * part.mask
    policy_loss = clipped_policy_loss(log_ratio, part.advantages, part.mask, ppo.clip_ratio)
    ratio = log_ratio.detach().exp()
    means = {
        "policy_loss": policy_loss,
        "ratio": masked_mean(ratio, part.mask),
        "clip_fraction": masked_mean(((ratio - 1).abs() > ppo.clip_ratio).float(), part.mask),
        "step_kl": approximate_kl(log_ratio.detach(), part.mask),
    }
    loss = policy_loss
    if has_critic(ppo):
        means["value_loss"] = clipped_value_loss(values, part.values, part.returns, part.mask, ppo.clip_value)
        loss = loss + ppo.value_weight * means["value_loss"]
    if ppo.kl_in == "loss":
        drift = ESTIMATORS[ppo.kl_estimator]((logprobs - part.reference_logprobs) * part.mask)
        means["kl_loss"] = masked_mean(drift, part.mask)
        loss = loss + learner.kl_weight * means["kl_loss"]
    learner.engine.backward(share * loss)
    return {name: share * mean.detach() for name, mean in means.items()}


def _adapted(kl_weight: float, kl: float, ppo: Ppo) -> float:
    """Move the KL weight towards where a response's KL, in nats, is `ppo.kl_target`."""
    if ppo.kl_target is None:
        return kl_weight
    return adapted_weight(
        kl_weight, kl, target=ppo.kl_target, responses=ppo.responses_per_update, horizon=ppo.kl_horizon
    )


def mean_over_processes(engine: Accelerator, metrics: Metrics) -> Metrics:
    """Return the mean over processes of numbers that each of them has."""
    if engine.num_processes == 1 or not metrics:
        return metrics
    values = torch.tensor(list(metrics.values()), dtype=torch.float32, device=engine.device)
    return dict(zip(metrics, engine.reduce(values, reduction="mean").tolist(), strict=True))


def _endless(rows: int, seed: int) -> Iterator[int]:
    """Yield row numbers for ever, every row once before any comes again."""
    order = random.Random(seed)
    while True:
        yield from order.sample(range(rows), rows)
