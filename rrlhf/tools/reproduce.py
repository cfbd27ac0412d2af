"""`rrlhf reproduce`: a version made again from its key documents, upstream first, and compared with what is kept.

Two folders are bit-equal, equal within a tolerance, or differ, and then it is told where they first do.
"""

import json
import math
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, NamedTuple

import typer

from rrlhf.located import UsageError
from rrlhf.memo import sha256
from rrlhf.pipeline.ancestry import Graph
from rrlhf.pipeline.artifacts import BESIDE, HISTORY, Artifact, git_commit
from rrlhf.pipeline.graph import EXTERNAL, Node
from rrlhf.pipeline.keys import differences, external_digests, key_document
from rrlhf.pipeline.launch import execute, typed_sections
from rrlhf.tools.command_line import AsJson, Model, Profile, Set, opened
from rrlhf.tools.lineage.lookup import Lookup

CLOCKS = {"seconds", "tokens_per_second"}  # of the machine, not of the training
VERDICTS = ("differs", "equal within tolerance", "bit-equal")  # the worst first


class Difference(NamedTuple):
    """The largest difference in one part of a file."""

    file: str
    where: str  # a tensor, or a place in JSON or in a table
    by: float  # absolute; infinity where there is nothing to subtract
    tolerated: bool

    def __str__(self) -> str:
        return f"{self.file}, {self.where}" + (f" by {self.by:.3g}" if self.by < math.inf else "")


class Rebuilt(NamedTuple):
    """What came of making one result again."""

    name: str
    differences: list[Difference]
    parted: str | None  # the first logged step that is not the same
    seconds: float

    @property
    def verdict(self) -> str:
        """What the comparison came to, in words."""
        tolerated = [difference.tolerated for difference in self.differences]
        return VERDICTS[2 if not tolerated else int(all(tolerated))]


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


def ancestry(lookup: Lookup, artifact: Artifact) -> list[Artifact]:
    """Return everything that leads to an artifact, every input before what is made from it; itself last.

    Raises UsageError when an input is nowhere to be had, and TamperedError for a changed file.
    """
    product = artifact.product
    above = Graph([product, *lookup.graph.products]).up(product)[:-1]
    return [*(lookup.find(each.key or each.digest) for each in above if each.node not in EXTERNAL), artifact]


def inputs_of(lookup: Lookup, artifact: Artifact) -> dict[str, Artifact]:
    """Return the artifacts that one was made from, by argument."""
    return {argument: lookup.input_of(artifact, argument) for argument in artifact.inputs if argument not in EXTERNAL}


def changed(lookup: Lookup, artifact: Artifact) -> list[str]:
    """Say what of code, library versions and outer inputs is not what an artifact's key document has."""
    document = artifact.manifest["document"]
    arms = inputs_of(lookup, artifact).values() if artifact.stage == "evaluate" else [artifact]
    settings = [made.manifest["document"]["params"].get("arm", {}) for made in arms]
    functions = sorted({path for arm in settings for path in arm.get("functions", {})})
    node = Node(artifact.name, artifact.stage, typed_sections(deepcopy(document["params"])), {}, tuple(functions))
    outside = external_digests(node, lookup.store.memo)
    return differences(document, key_document(node, {**document["inputs"], **outside}))


def rebuild(lookup: Lookup, order: Sequence[Artifact], beside: Path, *, tolerance: float) -> Iterator[Rebuilt]:
    """Make every artifact again in `beside`, from what was rebuilt before where that is part of `order`, else as kept.

    Ends after one that differs: what follows says nothing more.
    """
    made: dict[str, Path] = {}
    for number, kept in enumerate(order):
        out = beside / f"{number:02d}-{kept.name}"
        inputs = {argument: made.get(each.key, each.path) for argument, each in inputs_of(lookup, kept).items()}
        began = time.monotonic()
        execute(kept.manifest["document"], inputs=inputs, out=out, launch=lookup.params.launch)
        found = compare(kept.path, out, kept.manifest["files"], tolerance)
        one = Rebuilt(kept.name, found, first_step(kept.path, out) if found else None, time.monotonic() - began)
        yield one
        if one.verdict == "differs":
            return
        made[kept.key] = out


def compare(kept: Path, rebuilt: Path, files: Iterable[str], tolerance: float) -> list[Difference]:
    """Compare the files of two folders; history and card, which hold times, are left out.

    Numbers a and b are equal within tolerance t when |a - b| <= t + t |b|. What is not tolerated comes first.
    """
    found: list[Difference] = []
    for name in sorted(set(files) - BESIDE):
        if not (rebuilt / name).is_file():
            found.append(Difference(name, "the file is missing", math.inf, tolerated=False))
        elif sha256(kept / name) != sha256(rebuilt / name):
            found += _in_file(kept / name, rebuilt / name, name, tolerance)
    return sorted(found, key=lambda difference: difference.tolerated)


def first_step(kept: Path, rebuilt: Path) -> str | None:
    """Say at which logged step two trainings first part, to the last bit, or None when they never do."""
    rows, again = (_rows(folder / HISTORY) for folder in (kept, rebuilt))
    for row, other in zip(rows, again, strict=False):
        for name in row:
            if name not in CLOCKS and row[name] != other.get(name):
                return f"step {row.get('step', 0):g}: {name} {row[name]!r}, now {other.get(name)!r}"
    return None if len(rows) == len(again) else f"{len(rows)} logged rows, now {len(again)}"


def _rows(history: Path) -> list[dict[str, Any]]:
    lines = history.read_text(encoding="utf-8").splitlines() if history.is_file() else []
    return [json.loads(line) for line in lines]


def _in_file(kept: Path, rebuilt: Path, name: str, tolerance: float) -> list[Difference]:
    """Return the differences of two files with different bytes: at least one."""
    old, new = _parts(kept), _parts(rebuilt)
    if old is None or new is None:
        return [Difference(name, "bytes", math.inf, tolerated=False)]
    apart = {where: _apart(old.get(where), new.get(where), tolerance) for where in old | new}
    found = [Difference(name, where, by, tolerated) for where, (by, tolerated) in apart.items() if by]
    return found or [Difference(name, "layout: the values are equal", 0.0, tolerated=True)]


def _parts(path: Path) -> dict[str, Any] | None:
    """Return what a file holds by its place: tensors, texts and whole numbers. None for another kind of file."""
    import pyarrow.parquet as pq
    from safetensors.torch import load_file

    if path.suffix == ".safetensors":
        return dict(load_file(path))
    if path.suffix == ".json":
        return dict(_leaves(json.loads(path.read_bytes())))
    return dict(_leaves(pq.read_table(path).to_pydict())) if path.suffix == ".parquet" else None


def _leaves(value: Any, place: str = "value") -> Iterator[tuple[str, Any]]:
    """Yield every part of a JSON value with its place; a number with a point, and a list of such, is a tensor."""
    import torch

    if isinstance(value, Mapping):
        for key, part in value.items():
            yield from _leaves(part, str(key) if place == "value" else f"{place}.{key}")
    elif isinstance(value, float) or (isinstance(value, list) and value and all(isinstance(x, float) for x in value)):
        yield place, torch.tensor(value, dtype=torch.float64)
    elif isinstance(value, list):
        yield f"{place}, its length", len(value)
        for i, part in enumerate(value):
            yield from _leaves(part, f"{place}[{i}]")
    else:
        yield place, value


def _apart(old: Any, new: Any, tolerance: float) -> tuple[float, bool]:
    """Return the largest difference of two values, and whether it is tolerated."""
    import torch
    from torch import Tensor

    if not (isinstance(old, Tensor) and isinstance(new, Tensor)):
        return (0.0, True) if type(old) is type(new) and old == new else (math.inf, False)
    if old.shape != new.shape or old.dtype != new.dtype:
        return math.inf, False
    old, new = old.double(), new.double()
    close = torch.allclose(old, new, rtol=tolerance, atol=tolerance, equal_nan=True)
    by = (old - new).abs().masked_fill(old == new, 0).masked_fill(old.isnan() & new.isnan(), 0)
    return float(by.nan_to_num(nan=math.inf, posinf=math.inf).max()) if by.numel() else 0.0, close
