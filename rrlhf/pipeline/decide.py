"""What a run does: which nodes may compute, and what becomes of each; one decision for the plan and for the run."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from rrlhf.located import ParamsError, did_you_mean
from rrlhf.pipeline.graph import Node

Names = tuple[str, ...]
# "upstream": an input will run, and its result decides; "skip": left out of this run, and not up to date.
Action = Literal["run", "reuse", "restore", "upstream", "skip"]


class Part(NamedTuple):
    """The part of a run that is asked for, by names of nodes or of stages ("ppo": all arms that PPO trains)."""

    start: Names = ()  # --from: these and what is built on them
    until: Names = ()  # --until: these and what they are built on
    only: Names = ()  # --only: these alone
    force: Names = ()  # --force: compute these again, although their result is there


class Chosen(NamedTuple):
    """Names of nodes."""

    allowed: frozenset[str]  # may compute
    forced: frozenset[str]  # compute in any case


def chosen(part: Part, nodes: Sequence[Node]) -> Chosen:
    """Return the nodes that a part means. Raises ParamsError, telling every mistake, for what makes no sense."""
    mistakes: list[str] = []
    named = {
        option: _named(option, names, nodes, mistakes)
        for option, names in zip(("--from", "--until", "--only", "--force"), part, strict=True)
    }
    if part.only and (part.start or part.until):
        mistakes.append("--only names all that may run: it goes with neither --from nor --until")
    if mistakes:
        raise ParamsError("\n".join(mistakes))
    everything = {node.name for node in nodes}
    below = _reached(named["--from"], nodes, downwards=True) if part.start else everything
    above = _reached(named["--until"], nodes, downwards=False) if part.until else everything
    allowed = named["--only"] if part.only else below & above
    if not allowed:
        raise ParamsError(
            f"--from {', '.join(part.start)} --until {', '.join(part.until)}: nothing lies between them, for "
            f"{', '.join(part.until)} is not built on {', '.join(part.start)}"
        )
    if outside := sorted(named["--force"] - allowed):
        raise ParamsError(f"--force {', '.join(outside)}: the other options leave it out of this run")
    return Chosen(frozenset(allowed), frozenset(named["--force"]))


def matching(name: str, nodes: Iterable[Node]) -> list[Node]:
    """Return the node of this name, or all nodes of the stage of this name."""
    every = list(nodes)
    return [node for node in every if node.name == name] or [node for node in every if node.stage == name]


def unknown(name: str, nodes: Iterable[Node]) -> str:
    """Say that no node or stage has this name, and which one may be meant."""
    known = dict.fromkeys(each for node in nodes for each in (node.name, node.stage))
    return f"no stage {name!r}{did_you_mean(name, known)}"


def _named(option: str, names: Names, nodes: Sequence[Node], mistakes: list[str]) -> set[str]:
    found: set[str] = set()
    for name in names:
        these = {node.name for node in matching(name, nodes)}
        if not these:
            mistakes.append(f"{option} {name}: {unknown(name, nodes)}")
        found |= these
    return found


def _reached(names: set[str], nodes: Sequence[Node], *, downwards: bool) -> set[str]:
    """Return these nodes and all that is built on them, or all that they are built on."""
    found = set(names)
    for node in nodes if downwards else reversed(nodes):
        inputs = set(node.inputs.values())
        if downwards and inputs & found:
            found.add(node.name)
        elif not downwards and node.name in found:
            found |= inputs
    return found


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
