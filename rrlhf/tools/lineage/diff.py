"""What differs between two products: settings, code, rows of data, numbers, and the node where it begins."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from rrlhf.data.fingerprints import RowChanges, beginnings, row_changes
from rrlhf.pipeline.ancestry import Graph, Product
from rrlhf.pipeline.artifacts import Store
from rrlhf.pipeline.graph import EXTERNAL
from rrlhf.pipeline.keys import UNSET, Change, changes, in_words
from rrlhf.tools.lineage.rows import files_by_version
from rrlhf.tools.lineage.text import line

ROWS_SHOWN = 5  # of each kind and table
DIGITS = 12  # of a row's hash


class NodeDiff(NamedTuple):
    """One node of both ancestries."""

    name: str
    old: Product | None
    new: Product | None
    changes: list[Change]  # that begin here: an input that changed was changed further up
    reasons: list[str]  # why results differ, as far as that begins here

    @property
    def same(self) -> bool:
        """Whether both sides have this node with the same result of the same key document."""
        return bool(self.old and self.new and self.old.digest == self.new.digest and not self.reasons)


class Diff(NamedTuple):
    """Everything that differs between two products."""

    old: Product
    new: Product
    nodes: list[NodeDiff]  # upstream first
    metrics: dict[str, tuple[float | None, float | None]]  # the last value of every number that one of them logged
    rows: dict[str, RowChanges]  # by table
    texts: dict[str, str]  # how the rows that are shown begin, by hash
    unknown: str  # which rows could not be compared, and why

    @property
    def first(self) -> NodeDiff | None:
        """The node where the difference begins."""
        return next((node for node in self.nodes if node.reasons), None)


def compared(graph: Graph, old: Product, new: Product, store: Store) -> Diff:
    """Compare two products with everything that they were made from."""
    names = [name for name in {**old.metrics, **new.metrics} if name not in {"step", "seconds"}]
    numbers = {name: (old.metrics.get(name), new.metrics.get(name)) for name in names}
    return Diff(old, new, nodes(graph, old, new), numbers, *_rows(graph, old, new, store))


def nodes(graph: Graph, old: Product, new: Product) -> list[NodeDiff]:
    """Compare two ancestries node by node, upstream first; the two products themselves are compared with each other."""
    before, after = ({each.node: each for each in graph.up(product) if each.stage} for product in (old, new))
    if old.node != new.node:
        after[old.node] = after.pop(new.node)
    above = {
        name: max(len(graph.up(side[name])) for side in (before, after) if name in side) for name in before | after
    }
    order = sorted(above, key=lambda name: (above[name], name))
    return [_node(name, before.get(name), after.get(name)) for name in order]


def as_text(diff: Diff) -> str:
    """Return a diff for people."""
    lines = [f"A  {line(diff.old)}", f"B  {line(diff.new)}"]
    if diff.old.commit != diff.new.commit:
        lines.append(f"git commit {diff.old.commit or 'unknown'} -> {diff.new.commit or 'unknown'}")
    if diff.first is None and diff.old.digest == diff.new.digest:
        return "\n".join([*lines, "the same content, made in the same way"])
    if diff.first:
        lines.append(f"first difference: {diff.first.name} ({diff.first.reasons[0]})")
    lines.append("")
    for node in diff.nodes:
        first, *others = node.reasons or ["same" if node.same else "an input changed"]
        lines += [f"{node.name:12} {first}", *(f"{'':12} {reason}" for reason in others)]
    lines += ["", diff.unknown] if diff.unknown else []
    lines += ["", "rows of data"] if diff.rows else []
    for table, found in diff.rows.items():
        lines += _rows_told(table, found, diff.texts)
    lines += ["", "metrics" + " " * 28 + "A           B"]
    for name, values in diff.metrics.items():
        if values[0] != values[1]:
            old, new = ("-" if value is None else f"{value:.5g}" for value in values)
            lines.append(f"{name:34} {old:11} {new}")
    return "\n".join(lines)


def as_json(diff: Diff) -> dict[str, object]:
    """Return a diff for scripts."""
    return {
        "old": diff.old.digest,
        "new": diff.new.digest,
        "first_difference": diff.first.name if diff.first else None,
        "nodes": [
            {
                "node": node.name,
                "old": node.old.digest if node.old else None,
                "new": node.new.digest if node.new else None,
                "same": node.same,
                "changes": [
                    {"name": ".".join(path), "old": None if old is UNSET else old, "new": None if new is UNSET else new}
                    for path, old, new in node.changes
                ],
                "reasons": node.reasons,
            }
            for node in diff.nodes
        ],
        "rows": {
            table: {**found._asdict(), "changed": [pair._asdict() for pair in found.changed]}
            for table, found in diff.rows.items()
        },
        "metrics": diff.metrics,
        "unknown": diff.unknown,
    }


def _node(name: str, old: Product | None, new: Product | None) -> NodeDiff:
    if old is None or new is None:
        return NodeDiff(name, old, new, [], [f"only in {'B' if old is None else 'A'}"])
    if old.document is None or new.document is None:
        explained = old.digest == new.digest or old.inputs != new.inputs
        return NodeDiff(name, old, new, [], [] if explained else ["unknown: its settings were not kept"])
    found = changes(old.document, new.document)
    own = [change for change in found if change.path[0] != "inputs" or change.path[1] in EXTERNAL]
    if old.stage != new.stage:
        reasons = [f"another stage: {old.stage} -> {new.stage}"]
    elif not found and old.digest != new.digest:
        reasons = ["the same settings, code and inputs, and another result"]
    else:
        reasons = in_words(own)
    return NodeDiff(name, old, new, own, reasons)


def _rows(graph: Graph, old: Product, new: Product, store: Store) -> tuple[dict[str, RowChanges], dict[str, str], str]:
    """Compare the data sets above two products; return also how shown rows begin, and what cannot be compared."""
    before, after = ({each.digest: each for each in graph.up(end) if each.stage == "prepare"} for end in (old, new))
    if before.keys() == after.keys():
        return {}, {}, ""
    if len(before) != 1 or len(after) != 1:
        return {}, {}, f"rows: A has {len(before)} data sets above it, B {len(after)}"
    files = files_by_version(store)
    if missing := [line(data) for digest, data in {**before, **after}.items() if digest not in files]:
        return {}, {}, f"rows of {' and '.join(missing)}: their files are not here"
    one, other = files[next(iter(before))], files[next(iter(after))]
    found = row_changes(one, other)
    shown = {
        table: {*each.added[:ROWS_SHOWN], *each.removed[:ROWS_SHOWN], *(pair.new for pair in each.changed[:ROWS_SHOWN])}
        for table, each in found.items()
    }
    return found, beginnings(one, shown) | beginnings(other, shown), ""


def _rows_told(table: str, found: RowChanges, texts: Mapping[str, str]) -> list[str]:
    """List the rows that differ, a few of each kind, with the start of what they say."""
    added, removed, changed = (len(part) for part in found[:3])
    pairs = found.changed[:ROWS_SHOWN]
    shown = [f"  + {row[:DIGITS]} {texts.get(row, '')}" for row in found.added[:ROWS_SHOWN]]
    shown += [f"  - {row[:DIGITS]} {texts.get(row, '')}" for row in found.removed[:ROWS_SHOWN]]
    shown += [f"  ~ {p.old[:DIGITS]} -> {p.new[:DIGITS]} {texts.get(p.new, '')} ({p.what})" for p in pairs]
    more = added + removed + changed - len(shown)
    shown += [f"  and {more} more; --json lists all"] if more else []
    return [f"{table:12} {added} added, {removed} removed, {changed} changed, {found.kept} kept", *shown]
