"""Having a stage's result as it was decided: found, brought back, or computed and published; forced: compared."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Unpack

from rrlhf.environment import telling_full_disk
from rrlhf.located import MendableError
from rrlhf.pipeline.artifacts import BESIDE, Artifact, Beside, CopyError
from rrlhf.pipeline.graph import Node
from rrlhf.pipeline.keys import Document, key_digest
from rrlhf.pipeline.launch import execute
from rrlhf.pipeline.store import Store
from rrlhf.progress import say

if TYPE_CHECKING:
    from rrlhf.pipeline.decide import Chosen
    from rrlhf.pipeline.plan import Planned, Project

BringBack = Callable[[Store, str, str], Artifact | None]
Compute = Callable[[Path, IO[str]], None]


class DifferentError(MendableError):
    """A stage that was computed again gave another result."""

    exit_code = 3


def carry_out(
    project: Project,
    node: Node,
    planned: Planned,
    wanted: Chosen,
    digests: Mapping[str, str],
    compute: Compute,
    *,
    bring_back: BringBack,
    recorded: Callable[[Path], AbstractContextManager[None]],
    **beside: Unpack[Beside],
) -> tuple[Artifact | None, bool]:
    """Do what was decided for a node whose inputs have these digests; return its result, and whether it was computed.

    None where the run leaves it out. compute, recorded: as of `produce`.
    bring_back: from where copies are kept; one that is not what was made is warned of, and does as if it was not there.
    Of the machines that share a store one computes; what is here and not there is copied there.
    """
    forced, artifact = node.name in wanted.forced, None
    if planned.action == "restore" and planned.key:
        try:
            artifact = bring_back(project.store, node.stage, planned.key)
        except CopyError as error:
            say(f"{node.name}  {error}; it is left alone")
    if artifact or (planned.action != "reuse" and node.name not in wanted.allowed):
        return artifact, False
    document = project.document(node, digests)
    beside["profile"] = project.profile

    def produced() -> tuple[Artifact, bool]:
        return produce(project.store, node.name, document, compute, recorded=recorded, force=forced, **beside)

    shared, key = project.shared, key_digest(document)
    if not shared or (planned.action == "reuse" and shared.kept(node.stage, key)):
        return produced()
    with shared.alone(node.name, key):
        new = planned.action == "run" and not forced
        found = shared.fetch(project.store, node.stage, key) if new else None  # made while this one waited
        artifact, computed = (found, False) if found else produced()
        shared.keep(artifact)
        return artifact, computed


def produce(
    store: Store,
    name: str,
    document: Document,
    compute: Compute,
    *,
    recorded: Callable[[Path], AbstractContextManager[None]],
    force: bool = False,
    **beside: Unpack[Beside],
) -> tuple[Artifact, bool]:
    """Return the artifact of a key, and whether it was computed; who comes second waits and then finds it.

    compute: fills a folder, in which an interrupted run may have left something; what it starts holds the lock, too.
    recorded: open while that folder is filled and published. force: compute although there is an artifact. It stays,
    whatever comes out: a key has one result. Raises DifferentError when that is not the same, ParamsError when it
    would be refused without a signature.
    """
    stage, key = document["stage"], key_digest(document)
    with store.locked(key) as lock, telling_full_disk(store.root):
        there = store.find(stage, key)
        if there and not force:
            return there, False
        if store.notary and there is None:
            store.notary.check_making([name])
        staged = store.staging(f"again-{stage}" if there else stage, key)
        say(f"{name}  begins")
        began = time.monotonic()
        with recorded(staged):
            compute(staged, lock)
            if there is None:  # inside: what was recorded as finished is there to be found
                return store.publish(name, document, staged, seconds=time.monotonic() - began, **beside), True
        compare(name, there.manifest["files"], store.digests(staged), staged, store)
        return there, True


def compare_again(
    project: Project, document: Document, inputs: Mapping[str, Path], stored: Artifact, lock: IO[str]
) -> None:
    """Compute a stage once more, under the lock of its key, beside a result, and compare the two; see `compare`."""
    store = project.store
    staged = store.staging(f"again-{document['stage']}", key_digest(document))
    execute(document, inputs=inputs, out=staged, launch=project.params.launch, lock=lock)
    compare(stored.name, stored.manifest["files"], store.digests(staged), staged, store)


def compare(name: str, stored: Mapping[str, str], again: Mapping[str, str], staged: Path, store: Store) -> None:
    """Remove a result that was computed again, or keep it and raise DifferentError when a file of it differs.

    stored, again: the digest of every file by its name.
    """
    names = sorted({*stored, *again} - BESIDE)
    differing = [file for file in names if stored.get(file) != again.get(file)]
    if not differing:
        shutil.rmtree(staged)
        return
    kept = store.root / ".differing" / staged.name
    shutil.rmtree(kept, ignore_errors=True)
    kept.parent.mkdir(parents=True, exist_ok=True)
    staged.rename(kept)
    lines = [f"  {file}: {stored.get(file, 'no file')[:16]} -> {again.get(file, 'no file')[:16]}" for file in differing]
    raise DifferentError(
        f"{name} was computed again, and the result is another than the stored one:\n"
        + "\n".join(lines)
        + f"\nThe stored one stays; the other is in {kept}. Either the stage does not repeat itself on this machine, "
        "or it reads something that is not in its key, such as a file that a reward function opens."
    )
