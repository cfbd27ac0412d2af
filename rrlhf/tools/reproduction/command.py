"""`rrlhf reproduce`: is a version what its key documents make?"""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated

import typer

from rrlhf.located import UsageError
from rrlhf.tools.command_line import AsJson, Model, Profile, Set, opened

if TYPE_CHECKING:
    from rrlhf.pipeline.artifacts import Artifact
    from rrlhf.tools.lineage.lookup import Lookup
    from rrlhf.tools.reproduction.rebuild import Rebuilt


def reproduce(
    version: Model,
    only: Annotated[bool, typer.Option("--only", help="Its own stage alone, from the inputs that are kept.")] = False,
    tolerance: Annotated[
        float, typer.Option(min=0, help="Numbers a and b are equal when |a - b| <= t + t |b|.")
    ] = 1e-5,
    keep: Annotated[Path | None, typer.Option(help="New folder in which what is rebuilt stays.")] = None,
    profile: Profile = "default",
    set_: Set = None,
    as_json: AsJson = False,
) -> None:
    """Make a version again from its key documents and compare: bit-equal, equal within tolerance, or where it differs.

    The whole way up, from the data set on, in a temporary folder; nothing that is kept changes. What is not as the key
    documents say, in code, library versions or base models, is told first. Ends with exit code 1 when something
    differs. Bits depend on the number of threads too: launch.threads, and launch.arms_at_once.

    Example: rrlhf reproduce rrlhf-policy@candidate

    Example: rrlhf reproduce rrlhf-policy/3 --only --keep again
    """
    lookup = opened(profile, set_)
    if keep and keep.exists():
        raise UsageError(f"--keep {keep}: it exists already; name a new folder")
    artifact = lookup.find(version)
    from rrlhf.tools.reproduction.rebuild import ancestry, rebuild  # and with it torch

    order = [artifact] if only else ancestry(lookup, artifact)
    changes = _changes(lookup, order)
    rebuilt: list[Rebuilt] = []
    with TemporaryDirectory(prefix="reproduce-", dir=lookup.root / ".rrlhf", ignore_cleanup_errors=True) as beside:
        for one in rebuild(lookup, order, Path(beside), tolerance=tolerance):
            rebuilt.append(one)
            where = f"  {one.differences[0]}" if one.differences else ""
            said = f"{one.name:16}  {one.verdict:22}  {one.seconds:.1f} s{where}"
            print(said, file=sys.stderr if as_json else sys.stdout, flush=True)
        if keep:
            keep.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(beside, keep)
    print(json.dumps(_as_json(version, rebuilt, changes), indent=1) if as_json else conclusion(version, rebuilt))
    if worst(rebuilt).verdict == "differs":
        raise SystemExit(1)


def worst(rebuilt: Sequence[Rebuilt]) -> Rebuilt:
    """Return the first of those whose verdict is the worst."""
    from rrlhf.tools.reproduction.rebuild import VERDICTS

    return min(rebuilt, key=lambda one: VERDICTS.index(one.verdict))


def conclusion(version: str, rebuilt: Sequence[Rebuilt]) -> str:
    """Say in one sentence what was found, and where results first part."""
    first = worst(rebuilt)
    if not first.differences:
        return f"{version} is bit-equal to what its key documents make."
    parted = f"; its training first parted at {first.parted}" if first.parted else ""
    differs = first.verdict == "differs"
    said = "differs; it first does" if differs else "is equal within tolerance; the first bits that are not"
    return f"{version} {said} in {first.name}: {first.differences[0]}{parted}."


def _changes(lookup: Lookup, order: Sequence[Artifact]) -> dict[str, list[str]]:
    """Return what is not as the key documents have it, and say so on stderr."""
    from rrlhf.pipeline.artifacts import git_commit
    from rrlhf.tools.reproduction.rebuild import changed

    changes = {}
    for made in order:
        if reasons := changed(lookup, made):
            changes[made.name], commit = reasons, made.manifest["git_commit"]
            where = f" (it was made at commit {commit}, here is {git_commit(lookup.root)})" if commit else ""
            print(f"{made.name} is not what it was made with: {'; '.join(reasons)}{where}", file=sys.stderr)
    if changes:
        print("it is rebuilt with what is here, so it may differ", file=sys.stderr, flush=True)
    return changes


def _as_json(version: str, rebuilt: Sequence[Rebuilt], changes: dict[str, list[str]]) -> dict[str, object]:
    stages = [
        {
            "name": one.name,
            "verdict": one.verdict,
            "seconds": round(one.seconds, 1),
            "first_logged_difference": one.parted,
            "differences": [
                each._asdict() | {"by": each.by if math.isfinite(each.by) else None} for each in one.differences[:20]
            ],
        }
        for one in rebuilt
    ]
    return {"version": version, "verdict": worst(rebuilt).verdict, "changed": changes, "stages": stages}
