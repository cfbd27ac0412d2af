"""What the server keeps of an artifact, held against the artifact: tags, links, and copies of files."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

from rrlhf.pipeline.artifacts import SIGNATURE, Artifact
from rrlhf.pipeline.stages import spec_of
from rrlhf.pipeline.tracking.models import INSIDE, MLMODEL, same, version_tags


def tag_fault(artifact: Artifact, tags: dict[str, str]) -> str | None:
    """Say which tag of a registered version is not what its artifact says, or None."""
    for name, value in version_tags(artifact).items():
        if tags.get(name) != value:
            return f"its tag {name}: expected {value}, found {tags.get(name)}"
    return None


class Kept:
    """Files and links on one server."""

    def __init__(self, client: Any, experiment_id: str) -> None:
        self._client, self._experiment_id = client, experiment_id

    @contextmanager
    def copy(self, artifact: Artifact) -> Iterator[tuple[Path, Path | None] | None]:
        """Yield the folder with the server's copy of an artifact's files, and its MLmodel; None when there is none.

        Copies on this machine are looked at where they lie, others are fetched for the time being.
        """
        from mlflow.artifacts import download_artifacts

        if spec_of(artifact.stage).model:
            places = [model.artifact_location for model in self._models(artifact)]
        else:
            places = [run.info.artifact_uri for run in self._runs(artifact)]
        if not places:
            yield None
            return
        with tempfile.TemporaryDirectory(prefix="rrlhf-audit-") as beside:
            parsed = urlparse(str(places[0]))
            is_here = parsed.scheme in {"", "file"}
            fetched = unquote(parsed.path) if is_here else download_artifacts(artifact_uri=places[0], dst_path=beside)
            folder = Path(fetched)
            yield (folder / INSIDE, folder / "MLmodel") if spec_of(artifact.stage).model else (folder, None)

    def mlmodel_digest(self, artifact: Artifact) -> str | None:
        """Return the sha256 that the MLmodel beside an artifact's copy had when it was written, where that is known."""
        return next((found.tags[MLMODEL] for found in self._models(artifact) if MLMODEL in found.tags), None)

    def link_fault(self, artifact: Artifact, run_id: str) -> str | None:
        """Say which models MLflow links to the run that made an artifact, when they are not its inputs, or None."""
        run = self._client.get_run(run_id)
        if run.data.tags.get("rrlhf.digest") != artifact.digest:
            return None  # links wait for inputs that are not registered yet
        tags = [self._client.get_logged_model(entry.model_id).tags for entry in run.inputs.model_inputs]
        keys = artifact.input_keys
        read = {(each.get("rrlhf.digest"), each.get("rrlhf.key") if keys else None) for each in tags}
        expected = {(artifact.inputs[name], keys.get(name)) for name in artifact.made_from}
        return None if read == expected else f"run {run_id}: expected links to {expected}, found {read}"

    def add_signature(self, artifact: Artifact) -> bool:
        """Put an artifact's signature beside every copy of its files, over one that is there; False without a copy."""
        signature = str((artifact.path / SIGNATURE).resolve())
        models = self._models(artifact) if spec_of(artifact.stage).model else []
        for model in models:
            self._client.log_model_artifact(model.model_id, signature, INSIDE)
        runs = [] if spec_of(artifact.stage).model else self._runs(artifact)
        for run in runs:
            self._client.log_artifact(run.info.run_id, signature)
        return bool(models or runs)

    def _runs(self, artifact: Artifact) -> list[Any]:
        return [*self._client.search_runs([self._experiment_id], same(artifact))]

    def _models(self, artifact: Artifact) -> list[Any]:
        found = self._client.search_logged_models([self._experiment_id], same(artifact))
        return [model for model in found if model.status == "READY"]
