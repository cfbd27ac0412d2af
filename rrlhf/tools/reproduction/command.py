"""`rrlhf reproduce`: is a version what its key documents make?"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rrlhf.located import UsageError
from rrlhf.tools.command_line import AsJson, Profile, Set, overrides
from rrlhf.types import Json

if TYPE_CHECKING:
    from rrlhf.tools.reproduction.rebuild import Rebuilt, Step


def reproduce(
    version: Annotated[
        str, typer.Argument(help="rrlhf-policy@candidate, rrlhf-policy/3, the start of a digest, or a folder.")
    ],
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
    from rrlhf.pipeline.params import load_params
    from rrlhf.tools.lineage.lookup import Lookup

    root = Path.cwd()
    params = load_params(root, profile, overrides(profile, set_))
    if keep and keep.exists():
        raise UsageError(f"--keep {keep}: it exists already; name a new folder")
    lookup = Lookup(root, profile, params)
    artifact = lookup.find(version)
    from rrlhf.tools.reproduction.rebuild import rebuild, steps  # and with it torch

    found = steps(lookup, artifact, whole=not only)
    order = found[-1:] if only else found
    changes = _tell_changes(root, order, found)
    beside = Path(tempfile.mkdtemp(prefix="reproduce-", dir=_made(root / ".rrlhf")))
    rebuilt: list[Rebuilt] = []
    try:
        kept = {step.key: step.kept for step in found}
        for one in rebuild(order, kept, beside, launch=params.launch, tolerance=tolerance):
            rebuilt.append(one)
            print(_line(one), file=sys.stderr if as_json else sys.stdout, flush=True)
        if keep:
            keep.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(beside, keep)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    if as_json:
        print(json.dumps(_as_json(version, rebuilt, changes), indent=1))
    else:
        print(conclusion(version, rebuilt))
    if rebuilt[-1].comparison.verdict == "differs":
        raise SystemExit(1)


def verdict(rebuilt: Sequence[Rebuilt]) -> str:
    """Return the worst of the steps' verdicts."""
    said = {one.comparison.verdict for one in rebuilt}
    return next(worst for worst in ("differs", "equal within tolerance", "bit-equal") if worst in said)


def conclusion(version: str, rebuilt: Sequence[Rebuilt]) -> str:
    """Say in one sentence what was found, and where results first part."""
    worst = verdict(rebuilt)
    if worst == "bit-equal":
        return f"{version} is bit-equal to what its key documents make."
    first = next(one for one in rebuilt if one.comparison.verdict == worst)
    difference = first.comparison.differences[0]
    size = f" by {difference.by:.3g}" if difference.by < float("inf") else ""
    parted = f"; its training first parted at {first.parted}" if first.parted else ""
    said = "is equal within tolerance; the first bits that are not" if worst != "differs" else "differs; it first does"
    return f"{version} {said} in {first.name}: {difference.file}, {difference.where}{size}{parted}."


def _tell_changes(root: Path, order: Sequence[Step], found: Sequence[Step]) -> dict[str, list[str]]:
    """Say on stderr what is not as the key documents have it."""
    from rrlhf.pipeline.artifacts import git_commit
    from rrlhf.tools.reproduction.rebuild import changed, functions_of

    everything = sorted({path for step in found for path in functions_of(step)})
    changes = {}
    for step in order:
        functions = everything if step.document["stage"] == "evaluate" else functions_of(step)
        if reasons := changed(root, step, functions):
            changes[step.name] = reasons
            commit = f" (it was made at commit {step.commit}, here is {git_commit(root)})" if step.commit else ""
            print(f"{step.name} is not what it was made with: {'; '.join(reasons)}{commit}", file=sys.stderr)
    if changes:
        print("it is rebuilt with what is here, so it may differ", file=sys.stderr, flush=True)
    return changes


def _line(one: Rebuilt) -> str:
    found = one.comparison
    first = found.differences[0] if found.differences else None
    where = (
        f"  {first.file}: {first.where}" + (f" by {first.by:.3g}" if first.by < float("inf") else "") if first else ""
    )
    return f"{one.name:16}  {found.verdict:22}  {found.files} files, {one.seconds:.1f} s{where}"


def _as_json(version: str, rebuilt: Sequence[Rebuilt], changes: dict[str, list[str]]) -> dict[str, Json]:
    listed: list[Json] = []
    for one in rebuilt:
        differences: list[Json] = [
            {"file": each.file, "where": each.where, "by": _finite(each.by), "tolerated": each.tolerated}
            for each in one.comparison.differences[:20]
        ]
        told: dict[str, Json] = {"name": one.name, "verdict": one.comparison.verdict, "files": one.comparison.files}
        told |= {"seconds": round(one.seconds, 1), "first_logged_difference": one.parted, "differences": differences}
        listed.append(told)
    changed: dict[str, Json] = {name: [*reasons] for name, reasons in changes.items()}
    return {"version": version, "verdict": verdict(rebuilt), "changed": changed, "stages": listed}


def _finite(value: float) -> float | None:
    return value if value < float("inf") else None


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder
