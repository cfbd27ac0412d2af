"""What becomes of a node in a run: one decision from what is known of its result, for the plan and for the run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

# "upstream": an input will run, and its result decides; "skip": left out of this run, and not up to date.
Action = Literal["run", "reuse", "restore", "upstream", "skip"]


@dataclass(frozen=True)
class Facts:
    """What is known of a node's result."""

    allowed: bool = True  # the run may compute it
    forced: bool = False  # the run is to compute it in any case
    missing: Sequence[str] = ()  # inputs of which nothing is known yet, so that its key is not known either
    twin: str = ""  # a node that the same run computes before it, with the same key
    here: bool = False  # in the store, and sound
    accepted: str = ""  # made by other code: why it stands for this one
    elsewhere: str = ""  # not here: where it can be brought back from, in words
    lacking: Sequence[str] = ()  # nowhere: why it has to be computed


def decide(facts: Facts) -> tuple[Action, list[str]]:
    """Return what becomes of a node, with the reasons in words."""
    action, reasons = _wanted(facts)
    return ("skip" if action in {"run", "upstream"} and not facts.allowed else action), reasons


def _wanted(facts: Facts) -> tuple[Action, list[str]]:
    if facts.missing:
        return "upstream", [f"after {', '.join(facts.missing)}"]
    if facts.twin:
        return "upstream", [f"the same as {facts.twin}"]
    if facts.forced:
        return "run", ["forced"]
    if facts.here:
        return "reuse", [f"accepted: {facts.accepted}"] if facts.accepted else []
    if facts.elsewhere:
        return "restore", [f"artifact missing, {facts.elsewhere}"]
    return "run", [*facts.lacking]
