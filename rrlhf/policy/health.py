"""Signs that a policy's training went wrong, each with a name, and the rule by which it shows in the logged metrics.

A finding asks for a rollback; `hacking_suspected` only warns. Rules read rows of metrics, one for each rollout, and
know no tensors: what is healthy can be judged from a log alone, and again from the same log.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from statistics import fmean, variance
from typing import NamedTuple

from rrlhf.config import Health
from rrlhf.types import Metrics

WINDOW = 3  # rollouts at the start and at the end that hacking compares
STANDARD_ERRORS = 3.0
EVENTS = "health.json"  # what a stage noticed, in its folder: a list of {step, name, detail, action}
MARK = "health_"  # begins the name of the metric that a row has where a detector fired
NONFINITE = f"{MARK}nonfinite"  # a row so marked lacks what was not finite: no log can hold it
DIVERGED = "diverged"  # the metric of a row with which a training ended for good


class DivergedError(ValueError):
    """Training went wrong for good; nothing of it is kept as a result."""


class Finding(NamedTuple):
    """A detector that fired."""

    name: str
    detail: str


class Event(NamedTuple):
    """Something that a training's health made it do or say."""

    step: int
    name: str
    detail: str
    action: str  # what was done


def findings(rows: Sequence[Metrics], start: Metrics, health: Health) -> list[Finding]:
    """Return what is wrong after the last of `rows`, which are those since the start or since the last rollback.

    start: the very first row, of the policy as it was before training.
    """
    row = rows[-1]
    found = [Finding(name, detail) for name, detail in _at_once(row, health) if detail]
    for name, rule in _LASTING.items():
        lately = [rule(row, start, health) for row in rows[-health.patience :]]
        if len(lately) == health.patience and all(lately):
            found.append(Finding(name, f"{lately[-1]} in {health.patience} rollouts one after another"))
    return found


def is_healthy(row: Metrics, start: Metrics, health: Health) -> bool:
    """Whether no rule, however long it has to hold before it fires, holds for this row."""
    at_once = [detail for _, detail in _at_once(row, health)]
    return not any([*at_once, *(rule(row, start, health) for rule in _LASTING.values())])


def _at_once(row: Metrics, health: Health) -> list[tuple[str, str]]:
    """Return the rules that need no patience, each with what it found or an empty text."""
    broken = [name for name, value in row.items() if not math.isfinite(value)]
    skipped, steps = row.get("skipped_steps", 0), row.get("optimizer_steps", 1)
    if skipped > health.max_skipped_steps or (skipped and not steps):
        broken.append(f"{skipped:g} gradients of the update")
    per_token = row.get("kl", 0.0) / max(row.get("response_tokens", 1.0), 1.0)
    far = f"KL to the reference of {per_token:.2f} nats per token" if per_token > health.max_token_kl else ""
    return [("nonfinite", f"not finite: {', '.join(broken)}" if broken else ""), ("kl_blowup", far)]


def _entropy_collapse(row: Metrics, start: Metrics, health: Health) -> str:
    now, before = row["entropy"], start["entropy"]
    return f"entropy {now:.3g} nats per token, at first {before:.3g}" if now < health.min_entropy * before else ""


def _length_explosion(row: Metrics, start: Metrics, health: Health) -> str:
    unfinished, before = 1 - row["finished"], 1 - start["finished"]
    ran_on = unfinished > health.max_unfinished and before <= health.max_unfinished / 2
    return f"{unfinished:.0%} of responses hit the length limit, at first {before:.0%}" if ran_on else ""


def _dead_reward(row: Metrics, start: Metrics, health: Health) -> str:
    constant = row["score_std"] <= 1e-6
    return f"all responses score {row['score']:.3g}: there is nothing to learn from" if constant else ""


_LASTING: dict[str, Callable[[Metrics, Metrics, Health], str]] = {
    "entropy_collapse": _entropy_collapse,
    "length_explosion": _length_explosion,
    "dead_reward": _dead_reward,
}


def hacking_suspected(rows: Sequence[Metrics]) -> Finding | None:
    """Return a warning where the reward rose and something that should stay drifted with it, or None.

    Compares the last WINDOW rollouts with the first: the mean score rose, and sigma grew by a tenth, repetition by .05,
    or length moved up or down by half; each by more than three standard errors of the difference. A policy that becomes
    better can do this too: it says where to look, and changes nothing.
    """
    rows = [row for row in rows if NONFINITE not in row]
    if len(rows) < 2 * WINDOW:
        return None
    change = {name: _change(rows, name) for name in ("score", "sigma", "repetition", "response_tokens")}
    before = {name: fmean(row[name] for row in rows[:WINDOW]) for name in change}
    drifted = {
        "sigma": change["sigma"] > 0.1 * before["sigma"],
        "repetition": change["repetition"] > 0.05,
        "response_tokens": abs(change["response_tokens"]) > 0.5 * before["response_tokens"],
    }
    told = {name: f"from {before[name]:.2f} to {before[name] + change[name]:.2f}" for name in change}
    moved = [f"{name.replace('_', ' ')} {told[name]}" for name, has in drifted.items() if has]
    if change["score"] <= 0 or not moved:
        return None
    return Finding("hacking_suspected", f"score {told['score']} with {', '.join(moved)}")


def suspected_at(rows: Sequence[Metrics]) -> int | None:
    """Return the step of the row at which a training's log first has hacking suspected, or None."""
    return next((int(row["step"]) for n, row in enumerate(rows, start=1) if hacking_suspected(rows[:n])), None)


def _change(rows: Sequence[Metrics], name: str) -> float:
    """Return by how much a metric's mean over the last rollouts differs from the first where beyond chance, else 0."""
    before, now = [row[name] for row in rows[:WINDOW]], [row[name] for row in rows[-WINDOW:]]
    change = fmean(now) - fmean(before)
    return change if abs(change) > STANDARD_ERRORS * math.sqrt((variance(before) + variance(now)) / WINDOW) else 0.0


def in_words(rows: Iterable[Metrics]) -> str:
    """Tell from a log how a training went: "healthy", or which detectors fired at which steps, and if it diverged."""
    steps: dict[str, list[str]] = {}
    diverged = False
    for row in rows:
        diverged |= DIVERGED in row
        for name in row:
            if name.startswith(MARK):
                steps.setdefault(name.removeprefix(MARK), []).append(f"{row['step']:g}")
    told = [f"{name} (step{'s' if len(at) > 1 else ''} {', '.join(at)})" for name, at in steps.items()]
    return ("DIVERGED: " if diverged else "") + (", ".join(told) or "healthy")
