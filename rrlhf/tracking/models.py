"""Models: logged models that hold files, registered versions that name them, and the links to what made them."""

from __future__ import annotations

import json
from typing import Any

from rrlhf.identity.memo import sha256
from rrlhf.stages import MODEL_NAMES
from rrlhf.store.artifacts import Artifact
from rrlhf.store.cards import summary
from rrlhf.tracking.records import (
    INSIDE,
    MLMODEL,
    dataset_input,
    has,
    linked_files,
    model_id_of,
    model_metrics,
    note,
    stage_tags,
    write_metrics,
    write_mlmodel,
)
from rrlhf.tracking.server import long_requests
from rrlhf.types import Dataset


class Models:
    """The logged models of one experiment and the registry of its server."""

    def __init__(self, client: Any, experiment_id: str) -> None:
        self._client, self._experiment_id = client, experiment_id

    def search(self, condition: str) -> list[Any]:  # mlflow.entities.model_registry.ModelVersion
        """Return the matching versions, newest first."""
        found: list[Any] = []
        token = None
        while True:
            page = self._client.search_model_versions(condition, page_token=token)
            found += page
            token = page.token
            if not token:
                return sorted(found, key=lambda each: (each.creation_timestamp, int(each.version)), reverse=True)

    def aliases(self) -> dict[tuple[str, str], tuple[str, ...]]:
        """Return the aliases of every version that has some; a search for versions does not tell them."""
        aliases: dict[tuple[str, str], tuple[str, ...]] = {}
        for model in self._client.search_registered_models():
            for alias, number in sorted(model.aliases.items()):
                aliases[model.name, str(number)] = (*aliases.get((model.name, str(number)), ()), alias)
        return aliases

    def version_of(self, artifact: Artifact) -> Any:  # mlflow.entities.model_registry.ModelVersion | None
        """Return the version of an artifact; one that never became ready is removed."""
        same = f"name = '{MODEL_NAMES[artifact.stage]}' and {has('key', artifact.key)}"
        for found in self.search(f"{same} and {has('digest', artifact.digest)}"):
            if found.status == "READY":
                # A search does not tell aliases.
                return self._client.get_model_version(found.name, str(found.version))
            self._client.delete_model_version(found.name, str(found.version))
        return None

    def new_version(self, artifact: Artifact, model_id: str, run_id: str, tags: dict[str, str]) -> Any:
        """Register a logged model. The tags come with the version, so there is never one without them."""
        from mlflow.exceptions import MlflowException

        name = MODEL_NAMES[artifact.stage]
        try:
            self._client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        made = self._client.create_model_version(
            name, f"models:/{model_id}", run_id, tags, description=summary(artifact.manifest), model_id=model_id
        )
        shown = [{"name": name, "version": made.version}]  # MLflow's page of the logged model reads this tag
        self._client.set_logged_model_tags(model_id, {"mlflow.modelVersions": json.dumps(shown)})
        return made

    def upload(self, artifact: Artifact, run_id: str) -> str:
        """Return the id of a logged model with the artifact's files, going on with one that was begun and not ended."""
        same = f"{has('key', artifact.key)} and {has('digest', artifact.digest)}"
        begun = self._client.search_logged_models([self._experiment_id], same)
        if any(model.status == "READY" for model in begun):
            return next(str(model.model_id) for model in begun if model.status == "READY")
        tags = {"rrlhf.digest": artifact.digest} | stage_tags(artifact.name, artifact.stage, artifact.key)
        model = (
            begun[0]
            if begun
            else self._client.create_logged_model(
                self._experiment_id, artifact.name, run_id, tags, model_type=artifact.stage
            )
        )
        with linked_files(artifact, INSIDE) as folder, long_requests():
            write_mlmodel(folder, model.model_id, run_id, artifact.stage)
            self._client.set_logged_model_tags(model.model_id, {MLMODEL: sha256(folder / "MLmodel")})
            self._client.log_model_artifacts(model.model_id, str(folder))
        self._client.set_logged_model_tags(model.model_id, note(artifact))
        self._client.finalize_logged_model(model.model_id, "READY")
        return str(model.model_id)

    def link(self, run: Any, artifact: Artifact, dataset: Dataset | None, model_id: str | None) -> None:
        """Tie a run to the data set and models it read and the model it made, in MLflow's own terms.

        The run's tag rrlhf.digest says that this is done; it waits until all inputs are registered.
        """
        from mlflow.entities import LoggedModelInput, LoggedModelOutput, RunTag

        run_id, tags = run.info.run_id, run.data.tags
        if tags.get("rrlhf.digest") == artifact.digest and tags.get("rrlhf.model") == (model_id or ""):
            return
        run = self._client.get_run(run_id)
        digests = [artifact.inputs[name] for name in artifact.made_from]
        read = {model_id_of(found[0]) for digest in digests if (found := self.search(has("digest", digest)))}
        new = read - {entry.model_id for entry in run.inputs.model_inputs}  # MLflow refuses to write one twice
        datasets = [dataset_input(dataset)] if dataset else []
        self._client.log_inputs(run_id, datasets, [LoggedModelInput(each) for each in sorted(new)])
        if model_id and model_id not in {entry.model_id for entry in run.outputs.model_outputs}:
            step = int(artifact.metrics.get("step", 0))
            self._client.log_outputs(run_id, [LoggedModelOutput(model_id, step)])
            write_metrics(self._client, run_id, model_metrics(run, dataset, model_id))
        if len(read) == len(set(digests)):
            done = {"rrlhf.digest": artifact.digest, "rrlhf.model": model_id or "", **note(artifact)}
            self._client.log_batch(run_id, tags=[RunTag(name, value) for name, value in done.items()])

    def keep_files(self, run: Any, artifact: Artifact, dataset: Dataset | None) -> None:
        """Keep the files of an artifact that is no model (the evaluation) with its run."""
        if run.data.tags.get("rrlhf.digest") == artifact.digest:
            return
        with linked_files(artifact) as folder, long_requests():
            self._client.log_artifacts(run.info.run_id, str(folder))
        self.link(run, artifact, dataset, None)
