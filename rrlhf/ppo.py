"""Stage 5: proximal policy optimisation against one reward head or the robust ensemble (Schulman et al. 2017).

Only the top layers train. The frozen layers below run once per rollout: what they leave serves the policy, its
value function, the reference (a frozen copy of the top layers) and the reward heads' features. A reward model with
its own trunk scores the decoded text.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from rrlhf.advantages import estimate, has_critic
from rrlhf.config import Arm, Model, Ppo
from rrlhf.judgement import Judgement, arm_reward, judge, reward_metrics
from rrlhf.kl import ESTIMATORS, adapted_weight
from rrlhf.losses import approximate_kl, clipped_policy_loss, clipped_value_loss
from rrlhf.models import (
    LanguageModel,
    PolicyTop,
    accelerator,
    autocast,
    decode,
    encode_prompt,
    load_model,
    microbatches,
    save_model,
)
from rrlhf.progress import track
from rrlhf.returns import masked_mean, token_rewards
from rrlhf.reward_functions import RewardFunction, load_functions
from rrlhf.reward_models.scoring import RewardModel, load_for_policy
from rrlhf.reward_models.trunk import trunk_layer
from rrlhf.rollout import Rollout, Samples, explained_variance, rollout_metrics, sample
from rrlhf.tables import prompts
from rrlhf.types import Log, Message, Metrics


class Sampled(NamedTuple):
    """One rollout response, kept so that other judges can read it later."""

    update: int
    prompt: int  # row of the ppo table
    response: str
    finished: bool
    kl: float  # log(pi / pi_ref) of the response, nats
    proxy: float
    heads: list[float]


@dataclass
class Learner:
    """All that changes while a policy trains, and the frozen models that it is compared with."""

    engine: Accelerator
    language: LanguageModel
    top: PolicyTop
    reference: PolicyTop
    policy: nn.Module  # `top`, wrapped for data parallelism
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    single: RewardModel
    ensemble: RewardModel
    reward_layer: int | None  # whose states the reward heads read; None: no reward model reads the policy's pass
    boundary: int  # layers below it are frozen
    kl_weight: float  # beta as it stands; moves where ppo.kl_target is set
    generator: torch.Generator  # sampling
    shuffle: torch.Generator  # order of minibatches
    functions: Sequence[RewardFunction] = ()  # of the arm


def run(
    *, model: Model, ppo: Ppo, arm: Arm, data: Path, sft: Path, reward: Path, ensemble: Path, out: Path, log: Log
) -> None:
    """Train one arm's policy from the SFT model and save it with the responses it gave on the way."""
    torch.manual_seed(arm.seed)
    engine = accelerator(model)
    functions = load_functions(arm.functions)
    learner = prepare_learner(engine, load_model(sft), model, ppo, arm.seed, reward, ensemble)
    learner.functions = functions
    asked = prompts(data, "ppo")
    encoded = [encode_prompt(learner.language, prompt, model) for prompt in asked]
    kept: list[Sampled] = []
    rows = train(learner, encoded, arm_reward(arm, engine), model, ppo, arm.seed, kept, asked)
    for row in track(rows, ppo.updates, f"ppo ({arm.reward})"):
        log(row)
    everyone = gather_object(kept)
    if engine.is_main_process:
        save_model(learner.language, out)
        columns = [row._asdict() for row in sorted(everyone, key=lambda row: row.update)]
        pq.write_table(pa.Table.from_pylist(columns), out / "rollouts.parquet")
        (out / "arm.json").write_text(arm.model_dump_json(), encoding="utf-8")
    engine.wait_for_everyone()


def prepare_learner(
    engine: Accelerator, language: LanguageModel, model: Model, ppo: Ppo, seed: int, reward: Path, ensemble: Path
) -> Learner:
    """Freeze what does not train and build the optimizer. Raises ValueError when the layers do not fit together."""
    single, several = (load_for_policy(folder, engine.device) for folder in (reward, ensemble))
    shared = None in {single.identity, several.identity}
    boundary, layer = language.layers - ppo.train_layers, trunk_layer(reward) if shared else None
    if boundary < (layer or 0):
        raise ValueError(
            f"ppo.train_layers {ppo.train_layers} of {language.layers} layers would train the reward trunk, whose "
            f"features are read at reward.layer {layer or 0}: at most {language.layers - (layer or 0)} layers can train"
        )
    language.network.requires_grad_(False).to(engine.device)
    top = PolicyTop(language, ppo.train_layers)
    reference = top.reference()
    for part in (top.layers, top.norm, top.value):
        part.requires_grad_(True)
    top.value.requires_grad_(has_critic(ppo))
    trained = [parameter for parameter in top.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=ppo.learning_rate, eps=1e-5)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=ppo.updates)
    policy, optimizer = engine.prepare(top, optimizer)
    own = seed * 1000 + engine.process_index
    return Learner(
        engine=engine,
        language=language,
        top=top,
        reference=reference,
        policy=policy,
        optimizer=optimizer,
        schedule=schedule,
        single=single,
        ensemble=several,
        reward_layer=layer,
        boundary=boundary,
        kl_weight=ppo.kl_weight,
        generator=torch.Generator(engine.device).manual_seed(own),
        shuffle=torch.Generator().manual_seed(own),
    )


def train(
    learner: Learner,
    encoded: list[list[int]],
    reward: Callable[[Judgement], Tensor],
    model: Model,
    ppo: Ppo,
    seed: int,
    kept: list[Sampled],
    asked: Sequence[list[Message]] = (),
) -> Iterator[Metrics]:
    """Alternate rollouts and optimisation; yield one row of metrics per update and append responses to `kept`.

    encoded: the prompts' tokens; asked: the same prompts as text, for reward models with a trunk of their own.
    Ends before `ppo.updates` with the first rollout whose KL is above `ppo.max_kl`, and does not train on it.
    """
    rank, processes = learner.engine.process_index, learner.engine.num_processes
    cursor = _endless(len(encoded), seed)
    for update in range(ppo.updates):
        began = time.perf_counter()
        batch = [next(cursor) for _ in range(ppo.prompts_per_update)][rank::processes]
        batch = [i for i in batch for _ in range(ppo.responses_per_prompt)]
        texts = [asked[i] for i in batch] if asked else []
        rollout, judgement, sampled, metrics = collect(learner, [encoded[i] for i in batch], reward, model, ppo, texts)
        ended = exceeds_budget(learner, metrics, ppo)
        if not ended:
            metrics |= optimise(learner, rollout, model, ppo)
            learner.schedule.step()
            adapt_kl_weight(learner, metrics["kl"], ppo)
        kl = metrics.pop("_kl_per_response")
        responses = [decode(learner.language, row) for row in sampled.lists()]
        kept += [
            Sampled(update, i, *rest)
            for i, *rest in zip(
                batch,
                responses,
                sampled.finished.tolist(),
                kl,
                judgement.single.tolist(),
                judgement.ensemble.mean.tolist(),
                strict=True,
            )
        ]
        metrics["tokens_per_second"] = rollout.mask.sum().item() * processes / (time.perf_counter() - began)
        yield {"step": update, **metrics}
        if ended:
            return


@torch.no_grad()
def collect(
    learner: Learner,
    batch: list[list[int]],
    reward: Callable[[Judgement], Tensor],
    model: Model,
    ppo: Ppo,
    asked: Sequence[list[Message]] = (),
) -> tuple[Rollout, Judgement, Samples, dict[str, Any]]:
    """Sample responses, judge them, and turn scores into advantages."""
    layers = (learner.boundary, *([] if learner.reward_layer is None else [learner.reward_layer]))
    with autocast(model):
        samples = sample(learner.language, batch, model.response_tokens, learner.generator, keep=layers)
        hidden = samples.states[learner.boundary]
        hidden = hidden[:, : int((samples.prompt_lengths + samples.mask.sum(1)).max())]
        place = (hidden, samples.prompt_lengths, samples.responses, samples.mask)
        old_logprobs, values = samples.logprobs, learner.top.value(samples.top).float().squeeze(-1)
        reference_logprobs, _ = learner.reference(*place)
        if torch.is_autocast_enabled(learner.engine.device.type):  # bfloat16: one row alone rounds differently
            old_logprobs, values = learner.top(*place)
    judgement = judge(
        samples,
        learner.single,
        learner.ensemble,
        reward_layer=learner.reward_layer,
        language=learner.language,
        asked=asked,
        microbatch_size=ppo.microbatch_size,
        functions=learner.functions,
    )
    score = torch.where(samples.finished, reward(judgement), ppo.missing_eos_score)
    mask = samples.mask
    log_ratio = (old_logprobs - reference_logprobs) * mask
    values = values * mask if has_critic(ppo) else torch.zeros_like(values)
    kl_cost = learner.kl_weight if ppo.kl_in == "reward" else 0.0
    rewards = token_rewards(score, ESTIMATORS[ppo.kl_estimator](log_ratio), mask, kl_cost)
    advantages, returns = estimate(learner.engine, ppo, rewards, values, mask)
    rollout = Rollout(
        hidden=hidden,
        prompt_lengths=samples.prompt_lengths,
        responses=samples.responses,
        mask=mask,
        logprobs=old_logprobs * mask,
        reference_logprobs=reference_logprobs * mask,
        values=values,
        advantages=advantages,
        returns=returns,
    )
    metrics: dict[str, Any] = {
        "_kl_per_response": log_ratio.sum(1).tolist(),
        "score": score.mean().item(),
        "kl_weight": learner.kl_weight,
        **reward_metrics(judgement),
        **rollout_metrics(rollout, samples),
    }
    if has_critic(ppo):
        metrics["explained_variance"] = explained_variance(rollout)
    return rollout, judgement, samples, metrics


def exceeds_budget(learner: Learner, metrics: Metrics, ppo: Ppo) -> bool:
    """Whether a rollout's KL to the reference is above `ppo.max_kl`; notes it in the metrics where there is a limit."""
    if ppo.max_kl is None:
        return False
    exceeds = _over_processes(learner.engine, metrics["kl"]) > ppo.max_kl
    metrics["kl_budget_exceeded"] = float(exceeds)
    return exceeds


def adapt_kl_weight(learner: Learner, kl: float, ppo: Ppo) -> None:
    """Move the learner's KL weight towards where a response's KL, in nats, is `ppo.kl_target`."""
    if ppo.kl_target is not None:
        learner.kl_weight = adapted_weight(
            learner.kl_weight,
            _over_processes(learner.engine, kl),
            target=ppo.kl_target,
            responses=ppo.responses_per_update,
            horizon=ppo.kl_horizon,
        )


def optimise(learner: Learner, rollout: Rollout, model: Model, ppo: Ppo) -> Metrics:
    """Take the update's optimizer steps on one rollout; return the means over them."""
    size = ppo.minibatch_size // learner.engine.num_processes
    rows: list[Metrics] = []
    for _ in range(ppo.epochs):
        order = torch.randperm(len(rollout.mask), generator=learner.shuffle).to(rollout.mask.device)
        rows += [_step(learner, rollout.rows(index), model, ppo) for index in order.split(size)]
        if _over_processes(learner.engine, rows[-1]["step_kl"]) > ppo.max_step_kl:
            break
    means: Metrics = {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}
    return means | {"optimizer_steps": len(rows), "learning_rate": float(learner.schedule.get_last_lr()[0])}


def _step(learner: Learner, rollout: Rollout, model: Model, ppo: Ppo) -> Metrics:
    metrics: Counter[str] = Counter()
    tokens = rollout.mask.sum()
    rows = list(range(len(rollout.mask)))
    for part, synchronised in microbatches(learner.engine, learner.policy, rows, ppo.microbatch_size):
        with synchronised:
            metrics.update(_accumulate(learner, rollout.rows(torch.tensor(part)), tokens, model, ppo))
    norm = learner.engine.clip_grad_norm_(learner.policy.parameters(), ppo.max_grad_norm)
    learner.optimizer.step()
    learner.optimizer.zero_grad()
    return {**metrics, "gradient_norm": float(norm)}


def _accumulate(learner: Learner, part: Rollout, tokens: Tensor, model: Model, ppo: Ppo) -> Metrics:
    """Add a part's share of the minibatch's gradient; return its share of the minibatch's means over `tokens`."""
    share = part.mask.sum() / tokens
    with autocast(model):
        logprobs, values = learner.policy(part.hidden, part.prompt_lengths, part.responses, part.mask)
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
    return {name: (share * mean).item() for name, mean in means.items()}


def _over_processes(engine: Accelerator, value: float) -> float:
    """Return the mean over processes of a number that each of them has."""
    return float(engine.reduce(torch.tensor(value, device=engine.device), reduction="mean"))


def _endless(rows: int, seed: int) -> Iterator[int]:
    """Yield row numbers for ever, every row once before any comes again."""
    order = random.Random(seed)
    while True:
        yield from order.sample(range(rows), rows)
