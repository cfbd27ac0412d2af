"""The commands that ask for ancestry: lineage, diff, audit. Heavy libraries are imported inside."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rrlhf.files import write
from rrlhf.tools.command_line import VERIFICATION_FAILED, AsJson

if TYPE_CHECKING:
    from rrlhf.data.fingerprints import RowChanges
    from rrlhf.pipeline.ancestry import Graph, Product
    from rrlhf.pipeline.tracking import Tracker, Version
    from rrlhf.tools.lineage.diff import Diff

Reference = "rrlhf-policy@candidate, rrlhf-policy/3, rrlhf-policy@latest, a data set's name, or the start of a digest"
Profile = Annotated[str, typer.Option(help="Profile whose nodes are named, and whose tracking.experiment is asked.")]


class Format(StrEnum):
    """How a lineage is written."""

    TREE = "tree"
    JSON = "json"
    MERMAID = "mermaid"
    DOT = "dot"
    HTML = "html"
    OPENLINEAGE = "openlineage"


def lineage(
    node: Annotated[str | None, typer.Argument(help=f"{Reference}.")] = None,
    down: Annotated[bool, typer.Option("--down", help="What was made from it, instead of what made it.")] = False,
    row: Annotated[
        str | None, typer.Option(help="Who saw a row of data: the start of its hash, or the row as JSON.")
    ] = None,
    format: Annotated[Format, typer.Option(help="How to write it.")] = Format.TREE,
    out: Annotated[Path | None, typer.Option(dir_okay=False, help="File to write instead of the terminal.")] = None,
    profile: Profile = "default",
    as_json: AsJson = False,
) -> None:
    """Show what a model, evaluation or data set came from, or what came from it; or who saw a row.

    Example: rrlhf lineage rrlhf-policy@candidate

    Example: rrlhf lineage data --down --format html --out lineage.html

    Example: rrlhf lineage --row 5bdda7cb
    """
    if (node is None) == (row is None):
        raise typer.BadParameter(f"name one of {Reference}; or a row of data with --row")
    format = Format.JSON if as_json else format
    graph, versions, tracker = _graph(profile)
    if row is not None:
        text = _row(graph, row, format)
    else:
        start = graph.find(str(node), profile)
        text = _written(*_told(graph, start, down, (versions, tracker), format), down, format)
    if out is None:
        print(text)
    else:
        write(out, text.rstrip("\n") + "\n")
        print(out)


def diff(
    a: Annotated[str, typer.Argument(help=f"{Reference}.")],
    b: Annotated[str, typer.Argument(help="What to compare it with.")],
    profile: Profile = "default",
    as_json: AsJson = False,
) -> None:
    """Show what differs between two models or data sets: settings, code, rows, numbers, and where it begins.

    Example: rrlhf diff rrlhf-policy/1 rrlhf-policy@candidate
    """
    from rrlhf.tools.lineage import diff as differences

    graph, versions, tracker = _graph(profile)
    found = compared(graph, graph.find(a, profile), graph.find(b, profile), Path.cwd(), (versions, tracker))
    print(json.dumps(differences.as_json(found), indent=1) if as_json else differences.as_text(found))


def audit(
    model: Annotated[
        str | None, typer.Argument(help=f"{Reference}; left out, everything that is here or registered.")
    ] = None,
    deep: Annotated[
        bool, typer.Option("--deep", help="Read every byte, also of MLflow's and DVC's copies; trust no time stamp.")
    ] = False,
    profile: Profile = "default",
    as_json: AsJson = False,
) -> None:
    """Check that everything kept is what was made: bytes, records, registry, all the way up. Exit code 0 or 3.

    With signatures.public_key set, also that every artifact is signed by that key.

    Example: rrlhf audit rrlhf-policy@candidate --deep
    """
    from rrlhf.pipeline.params import load_params
    from rrlhf.pipeline.signatures import notary_of
    from rrlhf.tools.auditing import audit as auditing

    root = Path.cwd()
    notary = notary_of(root, load_params(root, profile).signatures)
    graph, versions, tracker = _graph(profile, strict=False)
    start = graph.find(model, profile) if model else None
    report = auditing.Audit(root, graph, versions, tracker, deep=deep, notary=notary).run(start)
    print(json.dumps(auditing.as_json(report), indent=1) if as_json else auditing.as_text(report))
    if report.broken:
        raise SystemExit(VERIFICATION_FAILED)


def compared(graph: Graph, old: Product, new: Product, root: Path, registry: tuple[list[Version], Tracker]) -> Diff:
    """Compare two products with everything that they were made from."""
    from rrlhf.tools.lineage import diff as differences
    from rrlhf.tools.lineage.load import described

    told = described({*graph.up(old), *graph.up(new)}, *registry)
    rows, texts, unknown = _rows_between(graph, old, new, root)
    stages = differences.stages(graph, old, new, told)
    numbers = differences.metrics(told[old], told[new])
    return differences.Diff(told[old], told[new], stages, rows, numbers, texts, unknown)


def _graph(profile: str, *, strict: bool = True) -> tuple[Graph, list[Version], Tracker]:
    from rrlhf.pipeline.params import load_params
    from rrlhf.pipeline.tracking import Tracker
    from rrlhf.tools.lineage.load import load

    root = Path.cwd()
    tracker = Tracker.connect(root, load_params(root, profile).tracking.experiment)
    versions = tracker.versions()
    return load(root, versions, profile, strict=strict), versions, tracker


def _told(
    graph: Graph, start: Product, down: bool, registry: tuple[list[Version], Tracker], format: Format
) -> tuple[Graph, Product]:
    """Return the part of the graph that is shown; with settings and numbers where the format shows them."""
    from rrlhf.pipeline.ancestry import Graph
    from rrlhf.tools.lineage.load import described

    if format in {Format.TREE, Format.MERMAID, Format.DOT}:
        return graph, start
    told = described(graph.down(start) if down else graph.up(start), *registry)
    everything = [told.get(product, product) for product in graph.products]
    return Graph(everything), told[start] if start.stage else start


def _written(graph: Graph, start: Product, down: bool, format: Format) -> str:
    from rrlhf.tools.lineage import openlineage, text

    if format is Format.OPENLINEAGE:
        return openlineage.as_lines(openlineage.events(graph, graph.down(start) if down else graph.up(start)))
    if format is Format.JSON:
        return json.dumps(text.as_json(graph, start, down=down), indent=1)
    draw = {Format.TREE: text.tree, Format.MERMAID: text.mermaid, Format.DOT: text.dot, Format.HTML: text.page}[format]
    return draw(graph, start, down=down)


def _row(graph: Graph, row: str, format: Format) -> str:
    from rrlhf.tools.lineage import rows

    start = rows.digest_start(row)
    files = rows.files_by_version(Path.cwd())
    found = rows.sightings(graph, start, files)
    if format is Format.JSON:
        return json.dumps(rows.as_json(found), indent=1)
    away = [each for each in graph.products if each.stage == "prepare" and each.digest not in files]
    notes = [f"not searched, for its files are not here: {each.title} {each.short}" for each in away]
    return "\n".join([rows.as_text(found) or f"no data set that is here has the row {start}", *notes])


def _rows_between(
    graph: Graph, old: Product, new: Product, root: Path
) -> tuple[dict[str, RowChanges], dict[str, str], list[str]]:
    """Compare the data sets above two products; return also what shown rows say, and what cannot be compared."""
    from rrlhf.data.fingerprints import beginnings, row_changes
    from rrlhf.tools.lineage.diff import shown
    from rrlhf.tools.lineage.rows import files_by_version

    before, after = ([each for each in graph.up(product) if each.stage == "prepare"] for product in (old, new))
    if {each.digest for each in before} == {each.digest for each in after}:
        return {}, {}, []
    if len(before) != 1 or len(after) != 1:
        return {}, {}, [f"rows: A has {len(before)} data sets above it, B {len(after)}"]
    files = files_by_version(root)
    missing = [each for each in (*before, *after) if each.digest not in files]
    if missing:
        return {}, {}, [f"rows of {each.title} {each.short}: its files are not here" for each in missing]
    both = files[before[0].digest], files[after[0].digest]
    found = row_changes(*both)
    return found, beginnings(both[0], shown(found)) | beginnings(both[1], shown(found)), []
