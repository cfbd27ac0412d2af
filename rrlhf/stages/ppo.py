"""Stage 5: proximal policy optimisation against one reward head or the robust ensemble (Schulman et al. 2017).

An update samples a rollout, scores it, and takes a few optimizer steps on it. What trains and what is frozen stands
in rrlhf/policy/learner.py; what is done when training is interrupted or goes wrong, in rrlhf/policy/supervision.py.
"""

import random
import time
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from rrlhf.advantages import estimate, has_critic
from rrlhf.config import Health, Model, Ppo, PpoArm
from rrlhf.data.load import further_columns
from rrlhf.data.tables import columns_of, read_table
from rrlhf.environment import give_back_memory
from rrlhf.kl import ESTIMATORS, adapted_weight
from rrlhf.losses import approximate_kl, clipped_policy_loss, clipped_value_loss
from rrlhf.models.adapters import merged
from rrlhf.models.load import load_model, save_model
from rrlhf.models.processes import accelerator, accumulated, autocast
from rrlhf.models.rollout import Rollout, explained_variance, response_features, rollout_metrics, text_lengths
from rrlhf.models.shards import in_step, reads_weights
from rrlhf.models.text import Texts, most_cut
from rrlhf.policy.checkpoint import Checkpoints
from rrlhf.policy.excerpts import RolloutResponse
from rrlhf.policy.health import DivergedError
from rrlhf.policy.learner import Learner, prepare_learner
from rrlhf.policy.reward import (
    Prompts,
    Reward,
    arm_reward,
    load_reward_models,
    reference_scale,
    reward_metrics,
    write_arm,
)
from rrlhf.policy.reward_functions import load_functions
from rrlhf.policy.supervision import resumed, supervised, write_history
from rrlhf.progress import track
from rrlhf.returns import masked_mean, token_rewards
from rrlhf.types import Log, Metrics


def run(
    *,
    model: Model,
    ppo: Ppo,
    health: Health,
    arm: PpoArm,
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
    functions = load_functions(arm.functions, further_columns(data))
    engine = accelerator(model)
    language = load_model(sft, model, weights=reads_weights(engine))
    scale = reference_scale(arm, reward, ensemble)
    rewards = load_reward_models(reward, ensemble, engine.device, functions)
    learner = prepare_learner(engine, language, rewards, model=model, ppo=ppo, seed=arm.seed)
    rows, texts = read_table(data, "ppo"), Texts(language, model)
    messages = [row["prompt"] for row in rows]
    tokens = [texts.prompt(prompt) for prompt in messages]
    prompts = Prompts(tokens, messages, columns_of(rows), texts.told("ppo"))
    training = partial(train, learner, prompts, arm_reward(arm, engine, scale))
    checkpoints = Checkpoints(out, engine, model=model, ppo=ppo, health=health, arm=arm)
    history = resumed(learner, checkpoints, f"ppo ({arm.reward})")
    rewards.recount((messages[row.prompt], row.response) for row in history.responses)
    for row in track(supervised(training, learner, history, checkpoints, health), ppo.updates, history.label):
        log(row)
    responses = write_history(history, engine, messages, out)
    if history.diverged:
        raise DivergedError(history.diverged)
    save_model(merged(learner.language), out)
    if engine.is_main_process:
        pq.write_table(pa.Table.from_pylist([row._asdict() for row in responses]), out / "rollouts.parquet")
        write_arm(out, arm, scale)
    engine.wait_for_everyone()


def train(learner: Learner, prompts: Prompts, reward: Reward) -> Iterator[tuple[Metrics, list[RolloutResponse]]]:
    """Alternate rollouts and optimisation from where the learner is; yield each rollout's metrics and responses.

    Ends before `ppo.updates` with the first rollout whose KL is above `ppo.max_kl`, and does not train on it.
    """
    engine, ppo, step = learner.engine, learner.ppo, learner.rollouts
    order = islice(_endless(len(prompts.tokens), learner.seed), step * ppo.prompts_per_update, None)
    while learner.update < ppo.updates:
        began = time.perf_counter()
        batch = list(islice(order, ppo.prompts_per_update))[engine.process_index :: engine.num_processes]
        asked = [i for i in batch for _ in range(ppo.responses_per_prompt)]
        rollout, responses, metrics = collect(learner, prompts, asked, reward)
        metrics = learner.mean_over_processes(metrics)
        is_too_far = ppo.max_kl is not None and metrics["kl"] > ppo.max_kl
        if ppo.max_kl is not None:
            metrics["kl_budget_exceeded"] = float(is_too_far)
        if not is_too_far:
            metrics |= optimise(learner, rollout)
            if metrics["optimizer_steps"]:
                learner.schedule.step()
            if ppo.kl_target is not None:
                learner.kl_weight = adapted_weight(
                    learner.kl_weight,
                    metrics["kl"],
                    target=ppo.kl_target,
                    responses=ppo.responses_per_update,
                    horizon=ppo.kl_horizon,
                )
        tokens = rollout.mask.sum().item() * engine.num_processes
        metrics["tokens_per_second"] = tokens / (time.perf_counter() - began)
        learner.update = ppo.updates if is_too_far else learner.update + 1
        learner.rollouts += 1
        yield {"step": learner.rollouts - 1, **metrics}, responses


@torch.no_grad()
def collect(
    learner: Learner, prompts: Prompts, asked: Sequence[int], reward: Reward
) -> tuple[Rollout, list[RolloutResponse], Metrics]:
    """Sample responses, score them, and turn scores into advantages; asked: the prompt's row of each response."""
    model, ppo, rewards = learner.model, learner.ppo, learner.rewards
    tokens = [prompts.tokens[i] for i in asked]
    with autocast(model):
        samples = learner.sample(tokens)
        place, policy, reference = learner.read(tokens, samples)
    said = prompts.answered(asked, samples, learner.language)
    states = reference.states if policy.states is None else policy.states
    pooled = None if states is None else response_features(states, samples.prompt_lengths, text_lengths(samples))
    at_once = max(ppo.microbatch_tokens // (model.prompt_tokens + model.response_tokens), 1)
    scores = rewards.score(said, pooled, at_once)

    mask = samples.mask
    score = torch.where(samples.finished, reward(scores), ppo.missing_eos_score)
    log_ratio = (policy.logprobs - reference.logprobs) * mask
    values = policy.values * mask if has_critic(ppo) else torch.zeros_like(policy.values)
    kl_cost = learner.kl_weight if ppo.kl_in == "reward" else 0.0
    paid = token_rewards(score, ESTIMATORS[ppo.kl_estimator](log_ratio), mask, kl_cost)
    advantages, returns = estimate(learner.engine, ppo, paid, values, mask)
    rollout = Rollout(
        *place,
        logprobs=policy.logprobs * mask,
        reference_logprobs=reference.logprobs * mask,
        values=values,
        advantages=advantages,
        returns=returns,
    )
    gather = learner.engine.gather  # for shares and variances, which no mean over processes is
    everyone = map(gather, (log_ratio, mask, samples.entropy, samples.responses, samples.finished))
    metrics = {
        **most_cut([prompts.cut, rewards.cut]),
        "score": score.mean().item(),
        "score_std": gather(score).std(correction=0).item(),
        "kl_weight": learner.kl_weight,
        **reward_metrics(scores),
        **rollout_metrics(*everyone),
    }
    if has_critic(ppo):
        metrics["explained_variance"] = explained_variance(*map(gather, (values, returns, mask)))
    columns = (log_ratio.sum(1), scores.single, scores.ensemble.mean, scores.ensemble.std.mean(1))
    rows = zip(asked, said.texts, said.finished, *(column.tolist() for column in columns), strict=True)
    return rollout, [RolloutResponse(learner.rollouts, *row) for row in rows], metrics


def optimise(learner: Learner, rollout: Rollout) -> Metrics:
    """Take the update's optimizer steps on one rollout; return the means over them.

    A step whose gradient is not finite is left out and counted in `skipped_steps`.
    """
    ppo = learner.ppo
    size = ppo.minibatch_size // learner.engine.num_processes
    rows: list[Metrics] = []
    skipped = 0
    for _ in range(ppo.epochs):
        order = torch.randperm(len(rollout.mask), generator=learner.shuffle).to(rollout.mask.device)
        steps = [_step(learner, rollout.rows(index)) for index in order.split(size)]
        taken = [step for step in steps if step is not None]
        rows += taken
        skipped += len(steps) - len(taken)
        if taken and learner.mean_over_processes(taken[-1])["step_kl"] > ppo.max_step_kl:
            break
    give_back_memory()
    means: Metrics = {name: sum(row[name] for row in rows) / len(rows) for name in (rows[0] if rows else ())}
    counts = {"optimizer_steps": len(rows), "skipped_steps": skipped}
    rate = float(learner.optimizer.param_groups[0]["lr"])
    return learner.mean_over_processes(means) | counts | {"learning_rate": rate}


def _step(learner: Learner, rollout: Rollout) -> Metrics | None:
    """Take one optimizer step; None if its gradient was not finite and nothing was done."""
    shares: list[dict[str, Tensor]] = []
    tokens = learner.engine.reduce(rollout.mask.sum().float(), reduction="mean")  # over processes, as gradients are
    parts = in_step(rollout.packed(learner.ppo.microbatch_tokens), rollout.mask.device)
    for (index, counts), synchronised in accumulated(learner.engine, learner.policy, parts):
        part = rollout.rows(index)
        with synchronised:
            shares.append(_accumulate(learner, part, counts * part.mask.sum() / tokens))
    norm = learner.clip_gradients()
    is_finite = norm < float("inf")  # false for nan as well; the same in all processes, which share their gradients
    if is_finite:
        learner.optimizer.step()
    learner.optimizer.zero_grad()
    if not is_finite:
        return None
    totals = torch.stack([torch.stack(list(share.values())) for share in shares]).sum(0).tolist()
    return dict(zip(shares[0], totals, strict=True)) | {"gradient_norm": norm}


def _accumulate(learner: Learner, part: Rollout, share: Tensor) -> dict[str, Tensor]:
    """Add a part's share of the minibatch's gradient; return its share of the minibatch's means over tokens."""
    ppo = learner.ppo
    with autocast(learner.model):
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


def _endless(rows: int, seed: int) -> Iterator[int]:
    """Yield row numbers for ever, every row once before any comes again."""
    order = random.Random(seed)
    while True:
        yield from order.sample(range(rows), rows)
