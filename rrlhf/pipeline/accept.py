"""Results of other code taken as what the present code would make: on record, with the reason.

A result that differs from what is wanted in its code alone gets a second key, that of the present code. Its files are
the same; what was accepted, and why, stands in its manifest and card. Data sets that earlier versions of this package
made, in data/, become artifacts in this way; models that name such a data set by its former digest are taken, too.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rrlhf.located import UsageError
from rrlhf.pipeline import dvc
from rrlhf.pipeline.artifacts import CARD, HISTORY, MANIFEST, SIGNATURE, Artifact
from rrlhf.pipeline.cards import about
from rrlhf.pipeline.decide import chosen
from rrlhf.pipeline.graph import DATA, Node
from rrlhf.pipeline.keys import UNSET, Document, changes, key_digest
from rrlhf.pipeline.plan import EVERYTHING, Project
from rrlhf.pipeline.produce import compare_again
from rrlhf.pipeline.store import Store
from rrlhf.progress import say
from rrlhf.types import SUMMARY


def accept(project: Project, nodes: list[Node], because: str, *, verify: bool) -> Iterator[tuple[str, str]]:
    """Accept the newest result of each of these nodes that differs in code alone; those up to date are passed over.

    Yields the node and the key of the earlier result. verify: compute it again first, and compare. Raises UsageError
    where there is none, or an input is not up to date; DifferentError when what was computed again is another result.
    """
    take_over(project.store)
    digests: dict[str, str] = {}
    found: dict[str, Artifact | None] = {}  # None: has to be brought back
    everything = chosen(EVERYTHING, project.nodes)
    for node in project.nodes:
        if missing := sorted(set(node.inputs.values()) - set(digests)):
            if node in nodes:
                raise UsageError(f"{node.name} reads {', '.join(missing)}, not up to date: accept or run that first")
            continue
        planned = project.decide(node, digests, everything)
        if planned.action == "run" and node in nodes:
            document = project.document(node, digests)
            old = _earlier(project, node, document)
            _publish(project, node, document, old, found, because, verify=verify)
            yield node.name, old.key
            planned = planned._replace(digest=old.digest)
        if planned.digest:
            digests[node.name] = planned.digest
            found[node.name] = project.store.find(node.stage, str(planned.key))


def only_code(old: Document, new: Document) -> bool:
    """Whether two key documents differ in their code, that of reward functions included, and in nothing else.

    A setting that the old one does not have came with newer code.
    """
    return all(
        change.path[0] in {"code", "functions"} or (change.path[0] == "params" and change.old == UNSET)
        for change in changes(old, new)
    )


def _earlier(project: Project, node: Node, document: Document) -> Artifact:
    """Return the newest result that differs in code alone, checked."""
    now = {former: made.digest for made in project.earlier if (former := made.manifest.get("formerly"))}
    for old in (one for one in project.earlier if one.name == node.name):
        inputs = {argument: now.get(digest, digest) for argument, digest in old.inputs.items()}
        if only_code(old.manifest["document"] | {"inputs": inputs}, document):
            project.store.verify(old)
            return old
    nearest = [reason for reason in project.closest(node, document)[0] if not reason.startswith("code: ")]
    said = "; ".join(nearest) or "none is left here whole"
    raise UsageError(f"{node.name}: no result that is here differs in code alone; of the nearest: {said}")


def _publish(
    project: Project,
    node: Node,
    document: Document,
    old: Artifact,
    found: Mapping[str, Artifact | None],
    because: str,
    *,
    verify: bool,
) -> None:
    """Publish an earlier result once more, under the key of the present code."""
    store, key, data = project.store, key_digest(document), found.get(DATA)
    read = {argument: artifact for argument, name in node.inputs.items() if (artifact := found[name])}
    if away := [name for name in node.inputs.values() if found[name] is None]:
        raise UsageError(f"{away[0]} has to be brought back first: rrlhf run --only {away[0]}")
    if store.notary:
        store.notary.check_making([node.name])
    with store.locked(key) as lock:
        if verify:
            folders = {argument: artifact.path for argument, artifact in read.items()}
            compare_again(project, document, folders, old, lock)
        staged = store.staging(f"accept-{node.stage}", key)
        shutil.rmtree(staged, ignore_errors=True)
        shutil.copytree(old.path, staged, copy_function=os.link)
        for name in (CARD, MANIFEST, SIGNATURE):  # written anew
            (staged / name).unlink(missing_ok=True)
        now = datetime.now(UTC).isoformat(timespec="seconds")
        made = store.publish(
            node.name,
            document,
            staged,
            seconds=float(old.manifest["seconds"]),
            dataset=about(data.dataset, project.params.prepare) if data else {},
            input_keys={argument: artifact.key for argument, artifact in read.items()},
            profile=project.profile,
            git_commit=old.manifest["git_commit"],
            hardware=old.manifest["hardware"],
            accepted={"from": old.key, "because": because, "verified": verify, "at": now},
            formerly=str(old.manifest.get("formerly", "")),
        )
    if node.name == DATA:
        dvc.keep(project.root, made.path)


def former_data(root: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yield the data sets in data/ that DVC's records say were made by the key document beside them."""
    locks = (root / "dvc.lock", root / "large" / "dvc.lock", *(root / "data" / "variants").glob("*/dvc.lock"))
    recorded = "".join(path.read_text(encoding="utf-8") for path in locks if path.is_file())
    for path in sorted((root / "data").glob("*.key.json")):
        folder = path.with_name(path.name.removesuffix(".key.json"))
        made_by = _md5(path.read_bytes())
        if folder.is_dir() and made_by in recorded and former_digest(folder).removeprefix("md5:") in recorded:
            yield folder, json.loads(path.read_bytes())


def take_over(store: Store) -> None:
    """Make an artifact of every such data set, unless it is one."""
    root = store.root.parent
    for folder, document in former_data(root):
        key = key_digest(document)
        with store.locked(key):
            if store.find("prepare", key):
                continue
            staged = store.staging("former", key)
            shutil.rmtree(staged, ignore_errors=True)
            shutil.copytree(folder, staged, copy_function=os.link)
            told = json.loads((folder / SUMMARY).read_bytes())
            numbers = {name: value for name, value in told.items() if isinstance(value, int | float)}
            (staged / HISTORY).write_text(json.dumps({"step": 0, **numbers}) + "\n", encoding="utf-8")
            made = store.publish(
                DATA, document, staged, seconds=0.0, profile=folder.name, formerly=former_digest(folder)
            )
        dvc.keep(root, made.path)
        say(f"{DATA}  data/{folder.name} is now {made.path.relative_to(root)}")


def former_digest(folder: Path) -> str:
    """Return the digest by which results made from a data set in data/ name it."""
    files = sorted((path.relative_to(folder).as_posix(), path) for path in folder.rglob("*") if path.is_file())
    listed = [{"md5": _md5(path.read_bytes()), "relpath": name} for name, path in files]
    return f"md5:{_md5(json.dumps(listed, sort_keys=True).encode())}.dir"


def _md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()
