"""The commands that ask for ancestry: lineage, diff, audit. Heavy libraries are imported inside."""

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from rrlhf.files import write
from rrlhf.tools.command_line import VERIFICATION_FAILED, AsJson, opened
from rrlhf.tools.lineage.lookup import Lookup

Reference = "rrlhf-policy@candidate, rrlhf-policy/3, rrlhf-policy@latest, a data set's name, or the start of a digest"
Format = Literal["tree", "json", "mermaid", "dot", "html", "openlineage"]
Profile = Annotated[str, typer.Option(help="Profile whose nodes are named, and whose tracking.experiment is asked.")]


def lineage(
    node: Annotated[str | None, typer.Argument(help=f"{Reference}.")] = None,
    down: Annotated[bool, typer.Option("--down", help="What was made from it, instead of what made it.")] = False,
    row: Annotated[
        str | None, typer.Option(help="Who saw a row of data: the start of its hash, or the row as JSON.")
    ] = None,
    format: Annotated[Format, typer.Option(help="How to write it.")] = "tree",
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
    format, lookup = "json" if as_json else format, opened(profile)
    if row is not None:
        told = _row(lookup, row, as_json=format == "json")
    else:
        from rrlhf.tools.lineage import text

        graph, start = lookup.graph, lookup.product(str(node))
        if format in {"json", "html", "openlineage"}:
            graph = lookup.described(graph.down(start) if down else graph.up(start))
        told = text.FORMATS[format](graph, graph.find(str(node), profile), down=down)
    if out is None:
        print(told)
    else:
        write(out, told.rstrip("\n") + "\n")
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

    lookup = opened(profile)
    graph = lookup.described(lookup.graph.up(lookup.product(a), lookup.product(b)))
    found = differences.compared(graph, graph.find(a, profile), graph.find(b, profile), lookup.store)
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
    from rrlhf.tools.auditing import audit as auditing

    lookup = opened(profile)
    report = auditing.Audit(lookup, deep=deep).run(lookup.product(model) if model else None)
    print(json.dumps(auditing.as_json(report), indent=1) if as_json else auditing.as_text(report))
    if report.broken:
        raise SystemExit(VERIFICATION_FAILED)


def _row(lookup: Lookup, row: str, *, as_json: bool) -> str:
    from rrlhf.tools.lineage.diff import digest_start, files_by_version, sightings, sightings_as_json, sightings_as_text

    start, files = digest_start(row), files_by_version(lookup.store)
    found = sightings(lookup.graph, start, files)
    if as_json:
        return json.dumps(sightings_as_json(found), indent=1)
    away = [each for each in lookup.graph.products if each.stage == "prepare" and each.digest not in files]
    notes = [f"not searched, for its files are not here: {each.title} {each.short}" for each in away]
    return "\n".join([sightings_as_text(found) or f"no data set that is here has the row {start}", *notes])
