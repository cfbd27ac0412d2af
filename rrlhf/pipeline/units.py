"""The unit of every number that a stage logs for its model, as docs/metrics.md has it."""

from __future__ import annotations

import re
from collections.abc import Mapping

NORMALISED = "normalised score"
SHARE = "share, 0 to 1"
NONE = "–"

_PPO = {
    "score": NORMALISED,
    "score_std": NORMALISED,
    "proxy": NORMALISED,
    "nominal": NORMALISED,
    "worst": NORMALISED,
    "spread": NORMALISED,
    "sigma": NORMALISED,
    "head_N": NORMALISED,
    "function_NAME": "of the function",
    "head_N_nominal": SHARE,
    "kl": "nats per response",
    "kl_k3": "nats per response",
    "kl_weight": "reward per nat",
    "kl_loss": "nats per token",
    "kl_budget_exceeded": "0 or 1",
    "entropy": "nats per token",
    "repetition": SHARE,
    "response_tokens": "tokens per response",
    "finished": SHARE,
    "policy_loss": "advantage",
    "value_loss": "squared reward",
    "explained_variance": "share, up to 1",
    "clip_fraction": SHARE,
    "step_kl": "nats per token",
    "optimizer_steps": "steps",
    "skipped_steps": "steps",
    "tokens_per_second": "tokens / s",
    "health_NAME": "1",
    "diverged": "1",
}
_REWARD = {
    "loss": "nats, or squared reward",
    "trunk_loss": "as `loss`",
    "heldout_accuracy": SHARE,
    "heldout_accuracy_READING": SHARE,
    "heldout_accuracy_stderr": "share",
    "heldout_accuracy_READING_stderr": "share",
    "heldout_ece": SHARE,
    "heldout_mce": SHARE,
    "heldout_brier": "0 to 1",
    "heldout_nll": "nats",
    "head_correlation": "−1 to 1",
    "head_spread": NORMALISED,
    "head_std": NORMALISED,
}
CUT = {"cut_prompts": SHARE, "cut_responses": SHARE, "cut_pairs": SHARE}  # of every stage that reads texts
_PAIRS = {
    "loss": "nats per pair; with `dpo.loss` `ipo` squared",
    "accuracy": SHARE,
    "margin": "implicit reward",
    "chosen_reward": "implicit reward",
    "rejected_reward": "implicit reward",
}
UNITS = {
    "sft": {"loss": "nats per token", "tokens": "tokens"},
    "reward": _REWARD,
    "member": _REWARD,
    "ensemble": _REWARD,
    "ppo": _PPO,
    "dpo": _PAIRS | {f"heldout_{name}": unit for name, unit in _PAIRS.items()},
    "best_of_n": {"reward": "the arm's reward", "kl_bound": "nats per response"},
}


TELLING = {  # the numbers that say most of a stage's result
    "sft": ("loss",),
    "reward": ("heldout_accuracy",),
    "member": ("heldout_accuracy",),
    "ensemble": ("heldout_accuracy_mean",),
    "ppo": ("proxy", "kl"),
    "dpo": ("heldout_accuracy", "loss"),
    "best_of_n": ("reward", "kl_bound"),
}


def telling(stage: str, metrics: Mapping[str, float]) -> str:
    """Return the numbers that say most of a result; of a comparison every policy's gold, or proxy where none judged."""
    judged = [name for name in metrics if name.endswith("_gold")] or [
        name for name in metrics if name.endswith("_proxy")
    ]
    names = [name for name in TELLING.get(stage, ()) if name in metrics] if stage in TELLING else judged
    return ", ".join(f"{name} {metrics[name]:.3g}" for name in names)


def cut_shares(metrics: Mapping[str, float]) -> dict[str, float]:
    """Return the share of each kind of text that a stage cut, 0 to 1, by kind: prompts, responses, pairs."""
    return {name.removeprefix("cut_"): metrics[name] for name in CUT if name in metrics}


def unit(stage: str, metric: str) -> str:
    """Return the unit of a metric that a stage logs; a dash where it has none."""
    return (CUT | UNITS.get(stage, {})).get(general(metric), NONE)


def general(metric: str) -> str:
    """Return a metric's name as the glossary writes it: "head_3" is "head_N"."""
    name = re.sub(r"^head_\d+", "head_N", metric)
    name = re.sub(r"^(heldout_accuracy)_(?!stderr$)[a-z]+", r"\1_READING", name)
    return re.sub(r"^(health|function)_.*", r"\1_NAME", name)
