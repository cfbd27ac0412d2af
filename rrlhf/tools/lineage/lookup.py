"""The artifact that a person means by a registered name, the start of a digest, or a folder."""

from __future__ import annotations

from pathlib import Path

from rrlhf.config import Params
from rrlhf.located import UsageError
from rrlhf.pipeline import dvc
from rrlhf.pipeline.ancestry import Graph
from rrlhf.pipeline.artifacts import MANIFEST, Artifact, CopyError, Store, read_artifact
from rrlhf.pipeline.graph import DATA
from rrlhf.pipeline.signatures import notary_of


class Lookup:
    """The artifacts of a project: those in its store, and those that MLflow can give back."""

    def __init__(self, root: Path, profile: str, params: Params) -> None:
        self.store = Store(root, notary_of(root, params.signatures))
        self._root, self._profile, self._experiment = root, profile, params.tracking.experiment

    def find(self, reference: str) -> Artifact:
        """Return the artifact of "rrlhf-ensemble@latest", "rrlhf-ensemble/3", a digest's or key's start, or a folder.

        Every file is checked, and the signature where there is a key. Raises UsageError with the closest names when
        there is none, or more than one, and TamperedError when a file is not what its manifest says.
        """
        folder = Path(reference)
        if folder.is_dir():
            if not (folder / MANIFEST).is_file():
                raise UsageError(f"{folder}: not the folder of an artifact, for it has no {MANIFEST}")
            return self._verified(read_artifact(folder))
        try:
            made = Graph(self.store.products()).find(reference, self._profile)
        except UsageError:
            return self._registered(reference)
        here = self.store.find(made.stage, made.key) if made.stage else None
        return self._verified(here) if here else self._registered(reference)

    def input_of(self, artifact: Artifact, argument: str) -> Artifact:
        """Return what an artifact was made from. Raises ValueError when neither this folder nor MLflow has it."""
        try:
            return self.find(artifact.input_keys.get(argument) or artifact.inputs[argument])
        except UsageError:
            digest = artifact.inputs[argument]
            raise ValueError(
                f"the {argument} that {artifact.name} was made from, {digest[:12]}, is neither here nor in MLflow"
            ) from None

    def _registered(self, reference: str) -> Artifact:
        """Find a version in MLflow, and bring its files back when they are not here."""
        from rrlhf.pipeline.tracking import Tracker
        from rrlhf.tools.lineage.load import graph_of

        tracker = Tracker.connect(self._root, self._experiment)
        found = graph_of(tracker.versions(), self._profile).find(reference, self._profile)
        if not found.key:
            raise UsageError(f"{reference!r} is {found.title}, which no stage made as an artifact; name a model")
        try:
            artifact = (dvc if found.node == DATA else tracker).bring_back(self.store, found.stage, found.key)
        except CopyError as error:
            raise CopyError(f"{error}\n`rrlhf run` with the settings that it was made with makes it again") from None
        if artifact is None:
            raise ValueError(f"{reference!r} is registered, but its files are neither here nor in MLflow")
        return artifact

    def _verified(self, artifact: Artifact) -> Artifact:
        self.store.verify(artifact)
        return artifact
