"""The rebuilding itself: every stage from its key document, into a folder of its own, upstream first."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import NamedTuple

from rrlhf.config import Launch
from rrlhf.memo import Memo
from rrlhf.pipeline.artifacts import Artifact
from rrlhf.pipeline.external import external_digests
from rrlhf.pipeline.graph import EXTERNAL, Node
from rrlhf.pipeline.keys import Document, differences, key_document
from rrlhf.pipeline.launch import execute, typed_sections
from rrlhf.tools.lineage.lookup import Lookup
from rrlhf.tools.reproduction.compare import Comparison, compare, first_step


class Step(NamedTuple):
    """One result to make again: its key document, and what is kept of it."""

    name: str
    key: str
    document: Document
    kept: Path
    files: list[str]
    made_from: dict[str, str]  # key of each input that is rebuilt or kept, by argument
    commit: str | None


class Rebuilt(NamedTuple):
    """What came of one step."""

    name: str
    comparison: Comparison
    parted: str | None  # the first logged step that is not the same
    seconds: float


def steps(lookup: Lookup, artifact: Artifact, *, whole: bool) -> list[Step]:
    """Return the steps that lead to an artifact, every input before what is made from it; itself last.

    whole: the whole way up, and not only the direct inputs.
    Raises ValueError when an input is nowhere to be had, and TamperedError for a changed file.
    """
    found: dict[str, Step] = {}

    def add(made: Artifact) -> None:
        if made.key in found:
            return
        read: dict[str, str] = {}
        if whole or made is artifact:
            inputs = {argument: lookup.input_of(made, argument) for argument in made.inputs if argument not in EXTERNAL}
            read = {argument: parent.key for argument, parent in inputs.items()}
            for parent in inputs.values():
                add(parent)
        manifest = made.manifest
        files, commit = sorted(manifest["files"]), manifest["git_commit"]
        found[made.key] = Step(made.name, made.key, manifest["document"], made.path, files, read, commit)

    add(artifact)
    return list(found.values())


def changed(root: Path, step: Step, functions: Sequence[str]) -> list[str]:
    """Say what of code, library versions and outer inputs is not what a step's key document has."""
    sections = typed_sections(deepcopy(step.document["params"]))
    node = Node(step.name, step.document["stage"], sections, {}, tuple(functions))
    outside = external_digests(node, Memo(root / ".rrlhf" / "digests.json"))
    now = key_document(node, {**step.document["inputs"], **outside})
    return differences(step.document, now)


def functions_of(step: Step) -> list[str]:
    """Return the import paths of the reward functions that a step's arm calls."""
    return sorted(step.document["params"].get("arm", {}).get("functions", {}))


def rebuild(
    order: Sequence[Step], kept: Mapping[str, Path], beside: Path, *, launch: Launch, tolerance: float
) -> Iterator[Rebuilt]:
    """Make every step again in `beside`, from what was rebuilt before where that is part of `order`, else as kept.

    kept: the folder of every input by its key. Ends after a step that differs: what follows says nothing more.
    """
    made = dict(kept)
    for number, step in enumerate(order):
        out = beside / f"{number:02d}-{step.name}"
        inputs = {argument: made[key] for argument, key in step.made_from.items()}
        began = time.monotonic()
        execute(step.document, inputs=inputs, out=out, log=lambda row: None, launch=launch)
        comparison = compare(step.kept, out, step.files, tolerance)
        parted = None if comparison.verdict == "bit-equal" else first_step(step.kept, out)
        yield Rebuilt(step.name, comparison, parted, time.monotonic() - began)
        if comparison.verdict == "differs":
            return
        made[step.key] = out
