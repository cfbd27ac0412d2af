"""The store: immutable folders `artifacts/<stage>/<key>/`, published by one rename and checked at every use.

A folder is named by its key, so finding a result needs no index.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, TYPE_CHECKING, Unpack

from rrlhf import hardware
from rrlhf.files import clear, sync
from rrlhf.locks import locked
from rrlhf.memo import Memo
from rrlhf.pipeline.ancestry import Graph, Product
from rrlhf.pipeline.artifacts import (
    CARD,
    MANIFEST,
    SIGNATURE,
    Artifact,
    Beside,
    CopyError,
    TamperedError,
    content_digest,
    git_commit,
    read_artifact,
    rows_of,
    sealed,
    way_out,
)
from rrlhf.pipeline.cards import card, last_values
from rrlhf.pipeline.keys import Document, key_digest

if TYPE_CHECKING:
    from rrlhf.pipeline.signatures import Notary


class Store:
    """The artifacts of one project folder.

    notary: signs what is published and verifies what is read, as far as there are keys; None: neither.
    """

    def __init__(self, root: Path, notary: Notary | None = None) -> None:
        self.root, self.notary = root / "artifacts", notary
        self.memo = Memo(root / ".rrlhf" / "digests.json")  # of files, while they are unchanged
        self._made = root / ".rrlhf" / "made"

    def folder(self, stage: str, key: str) -> Path:
        """Return where the result with this key lies, published or not."""
        return self.root / stage / key

    def staging(self, stage: str, key: str) -> Path:
        """Return the folder in which a result is prepared; what an interrupted run left in it is kept."""
        return self.root / ".staging" / f"{stage}-{key}"

    def find(self, stage: str, key: str) -> Artifact | None:
        """Return the artifact with this key, or None when there is none; files are not checked."""
        folder = self.folder(stage, key)
        if not folder.exists():
            return None
        artifact = read_artifact(folder)
        if artifact.key != key:
            raise TamperedError(f"{folder / MANIFEST} is that of another key, {artifact.key}{way_out(folder)}")
        return artifact

    def checked(self, stage: str, key: str) -> Artifact | None:
        """Like `find`, with every file's sha256 compared to the manifest, and its signature verified."""
        artifact = self.find(stage, key)
        if artifact:
            self.verify(artifact)
        return artifact

    def verify(self, artifact: Artifact) -> None:
        """Raise TamperedError naming the first file that differs, and every artifact built on it."""
        problem = self.fault(artifact)
        if problem:
            raise TamperedError(f"{problem}\nbuilt on it: {self.users(artifact.key)}{way_out(artifact.path)}")

    def fault(self, artifact: Artifact, *, deep: bool = False) -> str | None:
        """Say which file of an artifact is not what its manifest says, or None.

        deep: read every byte, also of files whose size, times and inode are those of an earlier look.
        """
        if deep:
            self.memo.forget(artifact.path)
        files: dict[str, str] = artifact.manifest["files"]
        try:
            for name, expected in files.items():
                path = artifact.path / name
                found = self.memo.sha256(path, expected) if path.is_file() else "no file"
                if found != expected:
                    return f"{path}: expected sha256 {expected}, found {found}"
        finally:
            self.memo.save()
        for path in sorted(artifact.path.rglob("*")):
            is_entry = path.is_symlink() or not path.is_dir()
            if is_entry and path.relative_to(artifact.path).as_posix() not in {*files, MANIFEST, SIGNATURE}:
                return f"{path}: expected no such file, {MANIFEST} does not list it"
        if artifact.digest != content_digest(files):
            return f"{artifact.path / MANIFEST}: the digest does not follow from the files it lists"
        return self.notary.fault(artifact.path, deep=deep) if self.notary else None

    def all(self) -> Iterator[Artifact]:
        """Yield every artifact whose manifest can be read."""
        for path in sorted(self.root.glob(f"[!.]*/*/{MANIFEST}")):
            with suppress(TamperedError):
                yield read_artifact(path.parent)

    def products(self) -> list[Product]:
        """Return every such artifact as part of a lineage, the newest first."""
        return sorted((artifact.product for artifact in self.all()), key=lambda made: made.created, reverse=True)

    def users(self, key: str) -> str:
        """Name the artifacts that were made from what has this key."""
        found = Graph(self.products()).built_on(key)
        return ", ".join(f"{made.node} {made.key[:8]}" for made in found) or "nothing yet"

    def publish(
        self, name: str, document: Document, staged: Path, *, seconds: float, **beside: Unpack[Beside]
    ) -> Artifact:
        """Turn a staged folder into the artifact of its key: manifest last, all synced, then one rename."""
        key = key_digest(document)
        rows = rows_of(staged)
        files = self.digests(staged)
        manifest = {
            "name": name,
            "key": key,
            "digest": content_digest(files),
            "document": document,
            "files": files,
            "metrics": last_values(rows),
            "git_commit": git_commit(self.root.parent),
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": round(seconds, 1),
            "hardware": hardware.describe(),
            "dataset": {},
            **beside,
        }
        if text := card(manifest, rows):
            (staged / CARD).write_text(text, encoding="utf-8")
            files[CARD] = self.memo.sha256(staged / CARD)
        (staged / MANIFEST).write_text(sealed(manifest), encoding="utf-8")
        if self.notary and self.notary.signs:
            self.notary.sign(staged)
        for path in staged.rglob("*"):
            sync(path)
        return self._placed(Artifact(staged, manifest))

    def digests(self, folder: Path) -> dict[str, str]:
        """Return the sha256 of every file in a folder, by its path inside, less a manifest and its signature."""
        return {
            path.relative_to(folder).as_posix(): self.memo.sha256(path)
            for path in sorted(folder.rglob("*"))
            if path.is_file() and path.name not in {MANIFEST, SIGNATURE}
        }

    def was_here(self, key: str) -> bool:
        """Whether this folder had the artifact of a key at some time, removed or not."""
        return (self._made / key).exists()

    def forget(self, folder: Path) -> None:
        """Keep no note of a result that nothing needs any more."""
        self.memo.forget(folder)
        self.memo.save()
        (self._made / folder.name).unlink(missing_ok=True)

    def restore(self, stage: str, key: str, download: Callable[[Path], Path | None], copy_of: str) -> Artifact | None:
        """Return the artifact of a key from the folder here, or else from a copy that is kept elsewhere.

        download: brings the copy into an empty folder and returns where it lies there; None where there is no copy.
        Raises CopyError, naming the copy ("MLflow's rrlhf-sft v1") and the file, when it is not what was made.
        """
        with self.locked(key):
            if artifact := self.checked(stage, key):
                return artifact
            staged = clear(self.staging("restore", key))
            try:
                copied = download(staged)
                return self.adopt(key, copied) if copied else None
            except CopyError as error:
                raise CopyError(f"{copy_of} is not what was made: {error}") from None
            finally:
                shutil.rmtree(staged, ignore_errors=True)

    def adopt(self, key: str, downloaded: Path) -> Artifact:
        """Publish a folder that holds a complete artifact already, after checking every byte and its signature.

        Raises CopyError, naming the file, when it is not the artifact with this key.
        """
        try:
            artifact = read_artifact(downloaded)
        except TamperedError as error:
            raise CopyError(str(error).partition("\n")[0].replace(f"{downloaded}/", "")) from None
        problem = None if artifact.key == key else f"{MANIFEST} is that of another key, {artifact.key}"
        if problem := problem or self.fault(artifact):
            raise CopyError(problem.replace(f"{downloaded}/", ""))
        return self._placed(artifact)

    def _placed(self, artifact: Artifact) -> Artifact:
        """Rename a complete folder to where its key has it, and remember that it was made here."""
        final = self.folder(artifact.stage, artifact.key)
        final.parent.mkdir(parents=True, exist_ok=True)
        artifact.path.rename(final)
        sync(final.parent)
        self.memo.renamed(artifact.path, final)
        self._made.mkdir(parents=True, exist_ok=True)
        (self._made / artifact.key).touch()
        return Artifact(final, artifact.manifest)

    def locked(self, key: str) -> AbstractContextManager[IO[str]]:
        """Hold the lock of a key, waiting for it if need be."""
        return locked(self.root / ".locks" / key)
