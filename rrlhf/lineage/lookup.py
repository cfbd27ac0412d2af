"""The artifact that a person means by a registered name, the start of a digest, or a folder."""

from __future__ import annotations

import re
from pathlib import Path

from rrlhf.config import Params
from rrlhf.located import UsageError
from rrlhf.signing.signatures import notary_of
from rrlhf.store.artifacts import MANIFEST, Artifact, Store, read_artifact


class Lookup:
    """The artifacts of a project: those in its store, and those that MLflow can give back."""

    def __init__(self, root: Path, params: Params) -> None:
        self.store = Store(root, notary_of(root, params.signatures))
        self._root, self._experiment = root, params.tracking.experiment

    def find(self, reference: str) -> Artifact:
        """Return the artifact of "rrlhf-ensemble@latest", "rrlhf-ensemble/3", a digest's or key's start, or a folder.

        Every file is checked, and the signature where there is a key. Raises UsageError with the closest names when
        there is none, or more than one, and TamperedError when a file is not what its manifest says.
        """
        if Path(reference).is_dir():
            return self._verified(_in_folder(Path(reference)))
        if re.fullmatch("[0-9a-f]{6,64}", reference) and (here := self._beginning_with(reference)):
            return self._verified(here)
        return self._registered(reference)

    def input_of(self, artifact: Artifact, argument: str) -> Artifact:
        """Return what an artifact was made from. Raises ValueError when neither this folder nor MLflow has it."""
        digest = artifact.inputs[argument]
        here = next((found for found in self.store.all() if found.digest == digest), None)
        try:
            return self._verified(here) if here else self._registered(digest)
        except UsageError:
            raise ValueError(
                f"the {argument} that {artifact.name} was made from, {digest[:12]}, is neither here nor in MLflow"
            ) from None

    def _beginning_with(self, start: str) -> Artifact | None:
        found = {item.digest: item for item in self.store.all() if item.digest.startswith(start)}
        found = found or {item.digest: item for item in self.store.all() if item.key.startswith(start)}
        if len(found) > 1:
            raise UsageError(f"{start!r} begins several digests: {', '.join(digest[:12] for digest in found)}")
        return next(iter(found.values()), None)

    def _registered(self, reference: str) -> Artifact:
        """Find a version in MLflow, and bring its files back when they are not here."""
        from rrlhf.lineage.load import from_versions
        from rrlhf.tracking import Tracker

        tracker = Tracker.connect(self._root, self._experiment)
        found = from_versions(tracker.versions()).find(reference)
        stage, key = found.stage, found.key
        if not key:
            raise UsageError(f"{reference!r} is {found.title}, which no stage made as an artifact; name a model")
        with self.store.locked(key):
            artifact = self.store.checked(stage, key)
            downloaded = self.store.staging("restore", key)
            if artifact is None and tracker.restore(stage, key, downloaded):
                artifact = self.store.adopt(stage, key, downloaded)
        if artifact is None:
            raise ValueError(f"{reference!r} is registered, but its files are neither here nor in MLflow")
        return artifact

    def _verified(self, artifact: Artifact) -> Artifact:
        self.store.verify(artifact)
        return artifact


def _in_folder(folder: Path) -> Artifact:
    if not (folder / MANIFEST).is_file():
        raise UsageError(f"{folder}: not the folder of an artifact, for it has no {MANIFEST}")
    return read_artifact(folder)
