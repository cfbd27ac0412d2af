"""Why a stage runs, or why not: in words, back to the first causes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rrlhf.pipeline.graph import Node
from rrlhf.pipeline.plan import Planned, Project


def explained(project: Project, planned: Sequence[Planned], name: str) -> Iterator[str]:
    """Yield lines on what would happen to a node and why; `planned` is the whole plan."""
    nodes = {node.name: node for node in project.nodes}
    plans = {one.node: one for one in planned}
    one = plans[name]
    if one.action == "reuse":
        yield f"{name} is up to date: {_where(project, nodes[name], one)}"
    elif one.action == "restore":
        yield f"{name} will be restored: {one.reasons[0]}"
    elif one.action == "run":
        yield f"{name} will run:"
        yield from (f"  {reason}" for reason in one.reasons)
        yield from _compared(project, nodes[name], planned, one)
    else:
        yield f"{name} depends on what will run before it; with equal results it is not run:"
        yield from _causes(nodes, plans, name)


def _where(project: Project, node: Node, one: Planned) -> str:
    artifact = project.store.find(node.stage, str(one.key))
    return artifact.made if artifact else str(one.key)


def _compared(project: Project, node: Node, planned: Sequence[Planned], one: Planned) -> Iterator[str]:
    """Say with which earlier result a node was compared."""
    digests = {each.node: each.digest for each in planned if each.digest}
    _, closest = project.closest(node, project.document(node, digests))
    if closest and one.reasons != ["artifact missing"]:
        yield f"compared with the closest earlier result: {closest.key[:12]}, made {closest.manifest['created']}"


def _causes(nodes: dict[str, Node], plans: dict[str, Planned], name: str) -> Iterator[str]:
    """Yield the nodes above that will run in any case, with their reasons, each once."""
    seen: set[str] = set()
    waiting = [*nodes[name].inputs.values()]
    while waiting:
        above = waiting.pop(0)
        if above in seen:
            continue
        seen.add(above)
        if plans[above].action == "run":
            yield f"  {above}: {'; '.join(plans[above].reasons)}"
        waiting += nodes[above].inputs.values()
