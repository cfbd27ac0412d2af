"""Settings that are fine alone and wrong together."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from rrlhf.located import did_you_mean

if TYPE_CHECKING:
    from rrlhf.config import Arm, Params

Mistake = tuple[tuple[str, ...], str]  # the path of the setting to blame, and what is wrong

# The settings that an arm's reward needs; any other reward has none.
NEEDED = {
    "robust": {"nominal_weight", "credible"},
    "batch_robust": {"nominal_weight", "credible"},
    "worst": {"credible"},
    "ellipsoid": {"credible"},
    "uwo": {"uncertainty_weight"},
    "mean_minus_std": {"uncertainty_weight"},
    "lower_bound": {"uncertainty_weight"},
    "entropic": {"temperature"},
    "gaussian_entropic": {"temperature"},
}
NOT_ARMS = {"candidate", "data", "latest", "sft"}  # names and aliases of something else
# Settings of the Bradley-Terry loss, with the value that changes nothing.
BRADLEY_TERRY_ONLY = {"margin": 0.0, "centring": 0.0, "label_smoothing": 0.0, "dro_temperature": None}


def contradictions(params: Params) -> Iterator[Mistake]:
    """Yield every contradiction between settings."""
    yield from _preparation(params)
    yield from _training(params)
    yield from _advantages_and_kl(params)
    yield from _reward_models(params)
    yield from _arms(params)


def _preparation(params: Params) -> Iterator[Mistake]:
    shares = params.prepare.shares.model_dump()
    if abs(sum(shares.values()) - 1) > 1e-9:
        yield ("prepare", "shares"), f"prepare.shares sum to {sum(shares.values()):g}, not to 1"
    if (params.prepare.source == "written") != (params.prepare.format == "written"):
        yield ("prepare", "format"), "prepare.source and prepare.format must be `written` together, or neither"
    if params.prepare.source == "written":
        for name in ("revision", "config", "split"):
            if getattr(params.prepare, name) is not None:
                yield ("prepare", name), f"prepare.{name} belongs to a hub data set; written tasks have none: set null"


def _training(params: Params) -> Iterator[Mistake]:
    ppo = params.ppo
    if ppo.responses_per_update % ppo.minibatch_size:
        per_prompt = f" * responses_per_prompt {ppo.responses_per_prompt}" if ppo.responses_per_prompt > 1 else ""
        yield (
            ("ppo", "minibatch_size"),
            f"ppo.minibatch_size {ppo.minibatch_size} does not divide prompts_per_update {ppo.prompts_per_update}"
            f"{per_prompt}",
        )
    batch = params.launch.processes
    for path, size in (
        (("sft", "batch_size"), params.sft.batch_size),
        (("dpo", "pairs_per_batch"), params.dpo.pairs_per_batch),
        (("ppo", "minibatch_size"), ppo.minibatch_size),
        (("ppo", "prompts_per_update"), ppo.prompts_per_update),
    ):
        if size % batch:
            yield path, f"{'.'.join(path)} {size} is not a multiple of launch.processes {batch}"
    if params.dpo.loss != "sigmoid" and params.dpo.label_smoothing:
        yield ("dpo", "label_smoothing"), f"dpo.label_smoothing belongs to the loss sigmoid, not to {params.dpo.loss}"
    if params.launch.processes > 1 and params.launch.arms_at_once > 1:
        yield ("launch", "arms_at_once"), "launch.arms_at_once must be 1 where launch.processes is above 1"


def _advantages_and_kl(params: Params) -> Iterator[Mistake]:
    ppo = params.ppo
    if ppo.estimator in {"rloo", "grpo"} and ppo.responses_per_prompt < 2:
        yield (
            ("ppo", "responses_per_prompt"),
            f"ppo.estimator {ppo.estimator} compares responses to one prompt: set responses_per_prompt to 2 or more",
        )
    if ppo.kl_in == "loss" and ppo.kl_estimator == "k1":
        yield (
            ("ppo", "kl_estimator"),
            "ppo.kl_estimator k1 has a gradient of expectation 0, so in the loss it holds nothing: set it to k2 or k3, "
            "or ppo.kl_in to reward",
        )
    if ppo.kl_target is not None and ppo.kl_weight == 0:
        yield ("ppo", "kl_weight"), "ppo.kl_weight 0 stays 0 whatever ppo.kl_target: start above 0"
    if ppo.kl_target is not None and ppo.max_kl is not None and ppo.max_kl <= ppo.kl_target:
        yield ("ppo", "max_kl"), f"ppo.max_kl {ppo.max_kl:g} ends the training before ppo.kl_target {ppo.kl_target:g}"


def _reward_models(params: Params) -> Iterator[Mistake]:
    ensemble = params.ensemble
    if ensemble.loss != "bradley_terry":
        for name, neutral in BRADLEY_TERRY_ONLY.items():
            if getattr(ensemble, name) != neutral:
                yield ("ensemble", name), f"ensemble.{name} belongs to the loss bradley_terry, not to {ensemble.loss}"

    reward = params.reward
    trains = reward.trunk != "frozen" or ensemble.kind == "lora"
    if trains and reward.train_layers > reward.layer:
        yield (
            ("reward", "train_layers"),
            f"reward.train_layers {reward.train_layers} is more than the {reward.layer} layers of the trunk",
        )
    if reward.revision is not None and reward.base is None:
        yield ("reward", "revision"), "reward.revision is the commit of reward.base, which is null"
    if not ensemble.freeze_backbone and ensemble.kind != "heads":
        yield ("ensemble", "freeze_backbone"), f"ensemble.freeze_backbone is for kind heads; {ensemble.kind} has no use"
    elif not ensemble.freeze_backbone and reward.trunk == "frozen":
        yield ("ensemble", "freeze_backbone"), "ensemble.freeze_backbone is false: set reward.trunk to lora or full"
    if ensemble.diversity and ensemble.kind != "lora":
        yield ("ensemble", "diversity"), f"ensemble.diversity is for kind lora, not for {ensemble.kind}"
    if ensemble.kind == "warm" and reward.trunk == "frozen" and ensemble.hidden:
        yield (
            ("ensemble", "hidden"),
            "ensemble.kind warm on a frozen trunk averages linear heads: set ensemble.hidden to 0 or train the trunk",
        )


def _arms(params: Params) -> Iterator[Mistake]:
    if params.tracking.candidate not in params.arms:
        hint = did_you_mean(params.tracking.candidate, list(params.arms))
        yield ("tracking", "candidate"), f"tracking.candidate {params.tracking.candidate!r} is not an arm{hint}"
    elif params.arms[params.tracking.candidate].method == "best_of_n":
        yield (
            ("tracking", "candidate"),
            f"tracking.candidate {params.tracking.candidate!r} chooses the best of n and is no model of its own: "
            "name an arm of method ppo or dpo",
        )
    if not params.arms:
        yield ("arms",), "arms is empty: name at least one policy to train"
    for name, arm in params.arms.items():
        if not re.fullmatch(r"(?!v\d+$)[a-z0-9][a-z0-9_-]{0,39}", name) or name in NOT_ARMS:
            yield (
                ("arms", name),
                f"arm name {name!r}: use lower-case letters, digits, - and _, which MLflow takes as an alias; not v1, "
                f"v2 and so on, {', '.join(sorted(NOT_ARMS))}",
            )
        yield from ((("arms", name), f"arms.{name}: {text}") for text in _arm(arm, params.best_of_n.samples))
        if arm.reward == "ellipsoid" and params.ensemble.sigma != "posterior":
            yield (
                ("arms", name),
                f"arms.{name}: reward ellipsoid is that of a posterior: set ensemble.sigma to posterior",
            )
        for path in arm.functions:
            if not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*", path):
                yield (
                    ("arms", name, "functions", path),
                    f"arms.{name}.functions: {path!r} is not module:function, for example my_rules:no_lists",
                )


def _arm(arm: Arm, samples: int | None) -> Iterator[str]:
    """Say what is wrong with an arm by itself."""
    if arm.method == "dpo":
        if arm.reward is not None:
            yield "method dpo sees no reward, it learns from the preferences themselves; leave reward out"
        if arm.functions:
            yield "method dpo sees no reward; leave functions out"
    elif arm.reward is None:
        yield f"method {arm.method} needs a reward"
    if arm.method == "best_of_n" and arm.n is None:
        yield "method best_of_n needs n, the number of responses to choose from"
    elif arm.method != "best_of_n" and arm.n is not None:
        yield f"method {arm.method} has no n; leave it out or null"
    if arm.n is not None and samples is not None and samples < arm.n:
        yield f"n {arm.n} is more than best_of_n.samples {samples}: raise that, or set it to null"
    needed, told = NEEDED.get(arm.reward or "", set()), f"reward {arm.reward}" if arm.reward else f"method {arm.method}"
    for setting in sorted(needed - set(arm.settings)):
        yield f"{told} needs {setting}"
    for setting in sorted(set(arm.settings) - needed):
        yield f"{told} has no {setting}; leave it out or null"
