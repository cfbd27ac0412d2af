"""Results of other code taken as what the present code would make: on record, with the reason.

A result that differs from what is wanted in its code alone gets a second key, that of the present code. Its files are
the same; what was accepted, and why, stands in its manifest and card.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import NamedTuple

from rrlhf.located import UsageError
from rrlhf.pipeline.artifacts import CARD, MANIFEST, SIGNATURE, Artifact
from rrlhf.pipeline.cards import about
from rrlhf.pipeline.graph import DATA, Node
from rrlhf.pipeline.keys import Document, changes, key_digest
from rrlhf.pipeline.plan import Project
from rrlhf.pipeline.produce import compare_again
from rrlhf.pipeline.versioning.datasets import accept_dataset, digests, earlier_dataset
from rrlhf.types import Json


class Accepted(NamedTuple):
    """A node whose earlier result was accepted."""

    node: str
    old: str  # key of the earlier result; of a data set its version
    verified: bool


def accept(project: Project, nodes: list[Node], because: str, *, verify: bool) -> Iterator[Accepted]:
    """Accept the newest result of each of these nodes that differs in code alone; those up to date are passed over.

    verify: compute it again first, and compare. Raises UsageError where there is none, or an input is not up to date;
    DifferentError when what was computed again is another result.
    """
    known: dict[str, str] = {}
    documents: dict[str, Document] = {}
    for node in project.nodes:
        if missing := sorted(set(node.inputs.values()) - set(known)):
            if node in nodes:
                raise UsageError(f"{node.name} reads {', '.join(missing)}, not up to date: accept or run that first")
            continue
        documents[node.name] = document = project.document(node, known)
        found = project.found(node, document)
        if found is None and node in nodes:
            one = _data if node.name == DATA else _model
            yield one(project, node, documents, because, verify)
            found = project.found(node, document)
        known |= {node.name: found.digest} if found else {}


def only_code(old: Document, new: Document) -> bool:
    """Whether two key documents differ in their code, that of reward functions included, and in nothing else."""
    return {change.path[0] for change in changes(old, new)} <= {"code", "functions"}


def _model(project: Project, node: Node, documents: Mapping[str, Document], because: str, verify: bool) -> Accepted:
    store, document = project.store, documents[node.name]
    key = key_digest(document)
    made = (one for one in project.earlier if one.name == node.name)
    old = next((one for one in made if only_code(one.manifest["document"], document)), None)
    if old is None:
        raise _none(project, node, document)
    store.verify(old)
    if store.notary:
        store.notary.check_making([node.name])
    data = project.dataset()
    read = {arg: _artifact(project, name, documents[name]) for arg, name in node.inputs.items() if name != DATA}
    folders = {arg: artifact.path for arg, artifact in read.items()}
    if DATA in node.inputs.values():
        if data is None:
            raise _away(DATA)
        folders[DATA] = data.path
    with store.locked(key):
        if verify:
            compare_again(project, node.name, document, folders, old.manifest["files"])
        staged = store.staging(f"accept-{node.stage}", key)
        shutil.rmtree(staged, ignore_errors=True)
        shutil.copytree(old.path, staged, copy_function=os.link)
        for name in (CARD, MANIFEST, SIGNATURE):  # written anew
            (staged / name).unlink(missing_ok=True)
        store.publish(
            node.name,
            document,
            staged,
            seconds=float(old.manifest["seconds"]),
            dataset=about(data, project.params.prepare) if data else {},
            input_keys={arg: artifact.key for arg, artifact in read.items()},
            profile=project.profile,
            git_commit=old.manifest["git_commit"],
            hardware=old.manifest["hardware"],
            accepted=_record(old.key, because, verify),
        )
    return Accepted(node.name, old.key, verify)


def _data(project: Project, node: Node, documents: Mapping[str, Document], because: str, verify: bool) -> Accepted:
    document = documents[DATA]
    place = project.place(document)
    old = earlier_dataset(project.root, lambda earlier: only_code(earlier, document))
    if old is None:
        raise _none(project, node, document)
    if verify:
        compare_again(project, DATA, document, {}, digests(project.root, old.path))
    accept_dataset(project.root, place, old, document, _record(old.digest, because, verify))
    return Accepted(DATA, old.digest, verify)


def _none(project: Project, node: Node, document: Document) -> UsageError:
    nearest = [reason for reason in project.closest(node, document)[0] if not reason.startswith("code: ")]
    said = "; ".join(nearest) or "none is left here whole"
    return UsageError(f"{node.name}: no result that is here differs in code alone; of the nearest: {said}")


def _artifact(project: Project, name: str, document: Document) -> Artifact:
    found = project.store.checked(document["stage"], key_digest(document))
    if found is None:
        raise _away(name)
    return found


def _away(name: str) -> UsageError:
    return UsageError(f"{name} has to be brought back first: rrlhf run --only {name}")


def _record(old: str, because: str, verified: bool) -> dict[str, Json]:
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return {"from": old, "because": because, "verified": verified, "at": now}
