"""What differs between two products: settings, code, rows of data, numbers, and the stage where it begins."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from rrlhf.data.fingerprints import RowChanges
from rrlhf.pipeline.ancestry import Graph, Product
from rrlhf.pipeline.graph import EXTERNAL
from rrlhf.pipeline.keys import UNSET, Change, changes
from rrlhf.tools.lineage.text import line
from rrlhf.types import Json

GROUPS = {"params": "parameter", "code": "code", "functions": "code", "numerics": "environment", "inputs": "input"}
ROWS_SHOWN = 5  # of each kind and table
DIGITS = 12  # of a row's hash


class StageDiff(NamedTuple):
    """One stage of both ancestries. `own` changes begin here; an input that changed was changed further up."""

    node: str
    old: Product | None
    new: Product | None
    own: list[Change]
    unexplained: str = ""  # why the results differ, when no change of the key documents says so

    @property
    def differs(self) -> bool:
        """Whether both sides have this stage with the same result of the same key document."""
        return not (self.old and self.new and self.old.digest == self.new.digest and not self.own)

    @property
    def begins(self) -> bool:
        """Whether a difference has its origin here."""
        return bool(self.own or self.unexplained) or self.old is None or self.new is None


class Diff(NamedTuple):
    """Everything that differs between two products."""

    old: Product
    new: Product
    stages: list[StageDiff]  # upstream first
    rows: dict[str, RowChanges]  # by table
    metrics: dict[str, tuple[float | None, float | None]]
    texts: dict[str, str]  # the start of rows, by hash
    unknown: list[str]  # what could not be compared, and why

    @property
    def first(self) -> StageDiff | None:
        """The stage where the difference begins."""
        return next((stage for stage in self.stages if stage.begins), None)


def stages(graph: Graph, old: Product, new: Product, told: Mapping[Product, Product]) -> list[StageDiff]:
    """Compare two ancestries node by node, upstream first; the two products themselves are compared with each other.

    told: products with their key documents, by the product of the graph.
    """
    before, after = _by_node(graph, old), _by_node(graph, new)
    if old.node != new.node:
        after[old.node] = after.pop(new.node)
    names = sorted(before.keys() | after.keys(), key=lambda name: _depth(graph, before.get(name), after.get(name)))
    return [_stage(name, before.get(name), after.get(name), told) for name in names]


def metrics(old: Product, new: Product) -> dict[str, tuple[float | None, float | None]]:
    """Return the last value of every number that both or one of two products logged."""
    names = [name for name in (dict(old.metrics) | dict(new.metrics)) if name not in {"step", "seconds"}]
    return {name: (old.metrics.get(name), new.metrics.get(name)) for name in names}


def as_text(diff: Diff) -> str:
    """Return a diff for people."""
    lines = [f"A  {line(diff.old)}", f"B  {line(diff.new)}"]
    if diff.old.commit != diff.new.commit:
        lines.append(f"git commit {diff.old.commit or 'unknown'} -> {diff.new.commit or 'unknown'}")
    if diff.first is None and diff.old.digest == diff.new.digest:
        return "\n".join([*lines, "the same content, made in the same way"])
    if diff.first:
        lines.append(f"first difference: {diff.first.node} ({_because(diff.first)[0]})")
    lines.append("")
    for stage in diff.stages:
        reasons = _because(stage) if stage.begins else ["an input changed" if stage.differs else "same"]
        lines += [f"{stage.node:12} {reasons[0]}", *(f"{'':12} {reason}" for reason in reasons[1:])]
    lines += [f"             unknown: {reason}" for reason in diff.unknown]
    return "\n".join([*lines, *_rows_told(diff.rows, diff.texts), *_metrics_told(diff.metrics)])


def as_json(diff: Diff) -> Json:
    """Return a diff for scripts."""
    found: list[Json] = [
        {
            "node": stage.node,
            "old": stage.old.digest if stage.old else None,
            "new": stage.new.digest if stage.new else None,
            "same": not stage.differs,
            "changes": [_change_as_json(change) for change in stage.own],
        }
        for stage in diff.stages
    ]
    rows: dict[str, Json] = {
        name: {
            "added": [*found.added],
            "removed": [*found.removed],
            "changed": [change._asdict() for change in found.changed],
            "kept": found.kept,
        }
        for name, found in diff.rows.items()
    }
    numbers: dict[str, Json] = {name: [old, new] for name, (old, new) in diff.metrics.items()}
    return {
        "old": diff.old.digest,
        "new": diff.new.digest,
        "first_difference": diff.first.node if diff.first else None,
        "stages": found,
        "rows": rows,
        "metrics": numbers,
        "unknown": [*diff.unknown],
    }


def _change_as_json(change: Change) -> Json:
    group, *names = change.path
    old, new = (None if value is UNSET else value for value in (change.old, change.new))
    return {"kind": GROUPS.get(group, group), "name": ".".join(names), "old": old, "new": new}


def _by_node(graph: Graph, product: Product) -> dict[str, Product]:
    return {each.node: each for each in graph.up(product) if each.stage}


def _depth(graph: Graph, *found: Product | None) -> tuple[int, str]:
    """Return how many products stand above, which orders two ancestries alike."""
    known = [product for product in found if product]
    return max(len(graph.up(product)) for product in known), known[0].node


def _stage(node: str, old: Product | None, new: Product | None, told: Mapping[Product, Product]) -> StageDiff:
    if old is None or new is None:
        return StageDiff(node, old, new, [])
    one, other = told.get(old, old), told.get(new, new)
    if one.document is None or other.document is None:
        told_apart = one.digest == other.digest or one.inputs != other.inputs
        return StageDiff(node, one, other, [], "" if told_apart else "unknown: its settings were not kept")
    found = changes(one.document, other.document)
    own = [change for change in found if change.path[0] != "inputs" or change.path[1] in EXTERNAL]
    random = not found and one.digest != other.digest
    return StageDiff(node, one, other, own, "the same settings, code and inputs, and another result" if random else "")


def _because(stage: StageDiff) -> list[str]:
    """Say why a stage differs."""
    if stage.old is None or stage.new is None:
        return [f"only in {'B' if stage.old is None else 'A'}"]
    if stage.old.stage != stage.new.stage:
        return [f"another stage: {stage.old.stage} -> {stage.new.stage}"]
    return [_in_words(change) for change in stage.own] or [stage.unexplained]


def _in_words(change: Change) -> str:
    kind, name = GROUPS.get(change.path[0], change.path[0]), ".".join(change.path[1:])
    if kind == "code":
        file = name if name.endswith(".py") else f"{name.replace('.', '/')}.py"
        what = "new" if change.old is UNSET else "gone" if change.new is UNSET else "changed"
        return f"code {file} {what}"
    return f"{kind} {name} {change.old} -> {change.new}"


def _rows_told(rows: Mapping[str, RowChanges], texts: Mapping[str, str]) -> list[str]:
    """List the rows that differ, a few of each kind, with the start of what they say."""
    lines = ["", "rows of data"] if rows else []
    for name, found in rows.items():
        counts = f"{len(found.added)} added, {len(found.removed)} removed, {len(found.changed)} changed"
        lines.append(f"{name:12} {counts}, {found.kept} kept")
        lines += [f"  + {row[:DIGITS]} {texts.get(row, '')}" for row in found.added[:ROWS_SHOWN]]
        lines += [f"  - {row[:DIGITS]} {texts.get(row, '')}" for row in found.removed[:ROWS_SHOWN]]
        lines += [
            f"  ~ {pair.old[:DIGITS]} -> {pair.new[:DIGITS]} {texts.get(pair.new, '')} ({pair.what})"
            for pair in found.changed[:ROWS_SHOWN]
        ]
        more = sum(max(len(part) - ROWS_SHOWN, 0) for part in found[:3])
        lines += [f"  and {more} more; --json lists all"] if more else []
    return lines


def shown(rows: Mapping[str, RowChanges]) -> dict[str, set[str]]:
    """Return the hashes of the rows, by table, that `as_text` shows."""
    return {
        name: {*found.added[:ROWS_SHOWN], *found.removed[:ROWS_SHOWN], *(p.new for p in found.changed[:ROWS_SHOWN])}
        for name, found in rows.items()
    }


def _metrics_told(numbers: Mapping[str, tuple[float | None, float | None]]) -> list[str]:
    lines = ["", "metrics" + " " * 28 + "A           B"]
    for name, (old, new) in numbers.items():
        if old != new:
            shown = ["-" if value is None else f"{value:.5g}" for value in (old, new)]
            lines.append(f"{name:34} {shown[0]:11} {shown[1]}")
    return lines if len(lines) > 2 else []
