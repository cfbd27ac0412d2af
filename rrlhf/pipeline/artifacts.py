"""The store: immutable folders `artifacts/<stage>/<key>/`, published by one rename and checked at every use.

A folder is named by its key, so finding a result needs no index. `artifact.json` in it records the key document,
the sha256 of every file, and the content digest that names this artifact as an input of others.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from shlex import quote
from typing import IO, TYPE_CHECKING, Any, TypedDict, Unpack

from rrlhf import hardware
from rrlhf.files import clear, sync
from rrlhf.located import MendableError
from rrlhf.locks import locked
from rrlhf.memo import Memo
from rrlhf.pipeline.ancestry import Graph, Product
from rrlhf.pipeline.cards import card, last_values
from rrlhf.pipeline.graph import DATA, EXTERNAL
from rrlhf.pipeline.keys import Document, key_digest
from rrlhf.progress import in_words
from rrlhf.types import Dataset

if TYPE_CHECKING:
    from rrlhf.pipeline.signatures import Notary

MANIFEST = "artifact.json"
SIGNATURE = "model.sig"  # of the manifest and all that it lists, where there are keys (rrlhf/pipeline/signatures.py)
HISTORY = "history.jsonl"  # the stage's log, with times
CARD = "README.md"  # what the artifact says of itself to people
BESIDE = frozenset({HISTORY, CARD})  # files that tell of the content: checked like all others, but not in its digest


class TamperedError(MendableError):
    """A stored file is not what its manifest says."""

    exit_code = 3


class CopyError(TamperedError):
    """A copy of an artifact that is kept elsewhere is not what was made."""


class Beside(TypedDict, total=False):
    """What a manifest tells of an artifact that is part of neither its key nor its digest."""

    dataset: Mapping[str, str]  # what is known of the data set below it (`rrlhf.pipeline.cards.about`), for its card
    input_keys: Mapping[str, str]  # by which key each input was made: two makings may have one content
    profile: str  # for which it was made
    accepted: Mapping[str, Any]  # of a result of other code: its key, and why it was taken (rrlhf/pipeline/accept.py)
    formerly: str  # of a data set that an earlier version of this package made: by which digest older results name it
    git_commit: str | None  # these two are then of the result that was accepted
    hardware: Mapping[str, str]


@dataclass(frozen=True)
class Artifact:
    """One published result."""

    path: Path
    manifest: dict[str, Any]

    @property
    def name(self) -> str:
        """The node that made it."""
        return str(self.manifest["name"])

    @property
    def stage(self) -> str:
        """The stage that made it."""
        return str(self.manifest["document"]["stage"])

    @property
    def key(self) -> str:
        """The sha256 of its key document."""
        return str(self.manifest["key"])

    @property
    def digest(self) -> str:
        """The sha256 of its content."""
        return str(self.manifest["digest"])

    @property
    def inputs(self) -> dict[str, str]:
        """Content digest of every input, by argument name."""
        return dict(self.manifest["document"]["inputs"])

    @property
    def input_keys(self) -> dict[str, str]:
        """The key by which each input was made, by argument name; older artifacts do not tell."""
        return dict(self.manifest.get("input_keys", {}))

    @property
    def made_from(self) -> list[str]:
        """The inputs that are models: neither the data set nor what lies outside the project."""
        return [argument for argument in self.inputs if argument not in {DATA, *EXTERNAL}]

    @property
    def metrics(self) -> dict[str, float]:
        """The last value of every number that the stage logged."""
        return dict(self.manifest["metrics"])

    @property
    def accepted(self) -> str:
        """Why a result of other code was taken for this one; empty where it was made."""
        return str(self.manifest.get("accepted", {}).get("because", ""))

    @property
    def dataset(self) -> Dataset:
        """A data set as those that read it record it: by the profile for which it was made."""
        return Dataset(str(self.manifest.get("profile", "")), self.path, self.digest)

    @property
    def product(self) -> Product:
        """What it is in a lineage; its names in the registry are not known here."""
        return Product(
            digest=self.digest,
            key=self.key,
            node=self.name,
            stage=self.stage,
            inputs=self.inputs,
            names=(self.dataset.name,) if self.name == DATA and self.dataset.name else (),
            input_keys=self.input_keys,
            profile=self.manifest.get("profile", ""),
            formerly=self.manifest.get("formerly", ""),
            document=self.manifest["document"],
            metrics=self.metrics,
            commit=self.manifest["git_commit"] or "",
            created=self.manifest["created"],
            seconds=self.manifest["seconds"],
        )

    @property
    def made(self) -> str:
        """Where it is and when it was made, in words."""
        when, took = self.manifest["created"], in_words(float(self.manifest["seconds"]))
        return f"artifacts/{self.stage}/{self.key}, made {when} in {took}"

    @property
    def size(self) -> int:
        """Bytes of its files."""
        return sum(path.stat().st_size for path in self.path.rglob("*") if path.is_file())

    def history(self) -> list[dict[str, float]]:
        """Return every row that the stage logged."""
        return rows_of(self.path)


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
            raise TamperedError(f"{folder / MANIFEST} is that of another key, {artifact.key}{_way_out(folder)}")
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
            raise TamperedError(f"{problem}\nbuilt on it: {self.users(artifact.key)}{_way_out(artifact.path)}")

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
                return self.adopt(stage, key, copied) if copied else None
            except CopyError as error:
                raise CopyError(f"{copy_of} is not what was made: {error}") from None
            finally:
                shutil.rmtree(staged, ignore_errors=True)

    def adopt(self, stage: str, key: str, downloaded: Path) -> Artifact:
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


def rows_of(folder: Path) -> list[dict[str, float]]:
    """Return the rows that a stage logged into a folder; of one that computes or was killed, the whole lines."""
    lines = (folder / HISTORY).read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def read_artifact(folder: Path) -> Artifact:
    """Return the artifact in a folder by its manifest; files are not checked.

    Raises TamperedError when the manifest is missing or not as it was written.
    """
    try:
        manifest = unsealed((folder / MANIFEST).read_bytes())
        if manifest["key"] != key_digest(manifest["document"]):
            raise ValueError("its key is not that of its key document")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        reason = "it is missing" if isinstance(error, FileNotFoundError) else error
        raise TamperedError(f"{folder / MANIFEST} is missing or was changed: {reason}{_way_out(folder)}") from None
    return Artifact(folder, manifest)


def sealed(document: dict[str, Any]) -> str:
    """Return the one text of a manifest, whose last field is the sha256 of all the rest.

    A seal finds accidents and careless edits. It is no signature: who rewrites a manifest can seal it again, and is
    then found by the registry, whose tags hold the digest of the content.
    """
    text = json.dumps(document, indent=1)
    return json.dumps(document | {"seal": hashlib.sha256(text.encode()).hexdigest()}, indent=1)


def unsealed(text: bytes) -> dict[str, Any]:
    """Return the manifest of a sealed text. Raises ValueError when a byte is not as `sealed` wrote it."""
    document = json.loads(text)
    if not isinstance(document, dict) or document.pop("seal", None) is None:
        raise ValueError("it has no seal")
    if text != sealed(document).encode():
        raise ValueError("its seal does not fit")
    return document


def content_digest(files: dict[str, str]) -> str:
    """Return the sha256 over the names and digests of an artifact's files, less those beside its content."""
    lines = [f"{digest}  {name}\n" for name, digest in sorted(files.items()) if name not in BESIDE]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def git_commit(root: Path) -> str | None:
    """Return the checked-out commit, with "-dirty" when files differ from it, or None outside git."""
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _way_out(folder: Path) -> str:
    return f"\nto have it restored or computed again: rm -r {quote(str(folder))}"
