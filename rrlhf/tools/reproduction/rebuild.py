"""The rebuilding itself: every result from its key document, into a folder of its own, upstream first."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from copy import deepcopy
from pathlib import Path
from typing import NamedTuple

from rrlhf.config import Launch
from rrlhf.memo import Memo
from rrlhf.pipeline.artifacts import Artifact
from rrlhf.pipeline.external import external_digests
from rrlhf.pipeline.graph import EXTERNAL, Node
from rrlhf.pipeline.keys import differences, key_document
from rrlhf.pipeline.launch import execute, typed_sections
from rrlhf.tools.lineage.lookup import Lookup
from rrlhf.tools.reproduction.compare import Difference, compare, first_step, verdict


class Rebuilt(NamedTuple):
    """What came of making one result again."""

    name: str
    differences: list[Difference]
    parted: str | None  # the first logged step that is not the same
    seconds: float

    @property
    def verdict(self) -> str:
        """What the comparison came to, in words."""
        return verdict(self.differences)


def ancestry(lookup: Lookup, artifact: Artifact) -> list[Artifact]:
    """Return everything that leads to an artifact, every input before what is made from it; itself last.

    Raises ValueError when an input is nowhere to be had, and TamperedError for a changed file.
    """
    found: dict[str, Artifact] = {}

    def add(made: Artifact) -> None:
        if made.key not in found:
            for parent in inputs_of(lookup, made).values():
                add(parent)
            found[made.key] = made

    add(artifact)
    return list(found.values())


def inputs_of(lookup: Lookup, artifact: Artifact) -> dict[str, Artifact]:
    """Return the artifacts that one was made from, by argument."""
    return {argument: lookup.input_of(artifact, argument) for argument in artifact.inputs if argument not in EXTERNAL}


def changed(root: Path, lookup: Lookup, artifact: Artifact) -> list[str]:
    """Say what of code, library versions and outer inputs is not what an artifact's key document has."""
    document = artifact.manifest["document"]
    arms = inputs_of(lookup, artifact).values() if artifact.stage == "evaluate" else [artifact]
    settings = [made.manifest["document"]["params"].get("arm", {}) for made in arms]
    functions = sorted({path for arm in settings for path in arm.get("functions", {})})
    node = Node(artifact.name, artifact.stage, typed_sections(deepcopy(document["params"])), {}, tuple(functions))
    outside = external_digests(node, Memo(root / ".rrlhf" / "digests.json"))
    return differences(document, key_document(node, {**document["inputs"], **outside}))


def rebuild(
    lookup: Lookup, order: Sequence[Artifact], beside: Path, *, launch: Launch, tolerance: float
) -> Iterator[Rebuilt]:
    """Make every artifact again in `beside`, from what was rebuilt before where that is part of `order`, else as kept.

    Ends after one that differs: what follows says nothing more.
    """
    made: dict[str, Path] = {}
    for number, kept in enumerate(order):
        out = beside / f"{number:02d}-{kept.name}"
        inputs = {argument: made.get(each.key, each.path) for argument, each in inputs_of(lookup, kept).items()}
        began = time.monotonic()
        execute(kept.manifest["document"], inputs=inputs, out=out, launch=launch)
        found = compare(kept.path, out, kept.manifest["files"], tolerance)
        yield Rebuilt(kept.name, found, first_step(kept.path, out) if found else None, time.monotonic() - began)
        if verdict(found) == "differs":
            return
        made[kept.key] = out
