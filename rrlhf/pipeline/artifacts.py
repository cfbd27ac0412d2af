"""An artifact: what a stage has published, in a folder with a manifest, artifact.json.

It records the key document, the sha256 of every file, and the content digest that names this artifact as an input of
others.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Any, TypedDict

from rrlhf.located import MendableError
from rrlhf.pipeline.ancestry import Product
from rrlhf.pipeline.graph import DATA, EXTERNAL
from rrlhf.pipeline.keys import key_digest
from rrlhf.progress import in_words
from rrlhf.types import Dataset

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
        raise TamperedError(f"{folder / MANIFEST} is missing or was changed: {reason}{way_out(folder)}") from None
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


def way_out(folder: Path) -> str:
    """Return how to be rid of what was changed, as a line to add to an error."""
    return f"\nto have it restored or computed again: rm -r {quote(str(folder))}"
