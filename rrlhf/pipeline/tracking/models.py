"""Models: logged models that hold files, registered versions that name them, and the links to what made them."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from typing import Any

from rrlhf.memo import sha256
from rrlhf.pipeline.artifacts import Artifact
from rrlhf.pipeline.stages import profile_of
from rrlhf.pipeline.tracking.records import (
    INSIDE,
    MADE,
    MLMODEL,
    dataset_input,
    description,
    has,
    linked_files,
    made_from,
    model_id_of,
    model_metrics,
    note,
    stage_tags,
    version_tags,
    write_metrics,
    write_mlmodel,
)
from rrlhf.pipeline.tracking.server import long_requests
from rrlhf.types import Dataset

SHOWN = "mlflow.modelVersions"  # tag that MLflow's page of a logged model reads


class Models:
    """The logged models of one experiment and the registry of its server."""

    def __init__(self, client: Any, experiment_id: str) -> None:
        self._client, self._experiment_id = client, experiment_id

    def search(self, condition: str) -> list[Any]:  # mlflow.entities.model_registry.ModelVersion
        """Return the matching versions, newest first."""
        found = every(partial(self._client.search_model_versions, condition))
        return sorted(found, key=lambda each: (each.creation_timestamp, int(each.version)), reverse=True)

    def aliases(self) -> dict[tuple[str, str], tuple[str, ...]]:
        """Return the aliases of every version that has some; a search for versions does not tell them."""
        aliases: dict[tuple[str, str], tuple[str, ...]] = {}
        for model in every(self._client.search_registered_models):
            for alias, number in sorted(model.aliases.items()):
                aliases[model.name, str(number)] = (*aliases.get((model.name, str(number)), ()), alias)
        return aliases

    def version_of(self, artifact: Artifact, name: str) -> Any:  # mlflow.entities.model_registry.ModelVersion | None
        """Return the version of an artifact under this name; one that never became ready is removed."""
        for found in (each for each in self.of(artifact.digest, artifact.key) if each.name == name):
            if found.status == "READY":
                # A search does not tell aliases.
                return self._client.get_model_version(found.name, str(found.version))
            self._client.delete_model_version(found.name, str(found.version))
        return None

    def of(self, digest: str, key: str | None) -> list[Any]:
        """Return the versions of a content and its making, newest first; no key: of any making."""
        found = self.search(has("key", key) if key else "")
        return [each for each in found if MADE in each.tags and json.loads(each.tags[MADE])["digest"] == digest]

    def inputs_of(self, artifact: Artifact, profile: str) -> dict[str, Any]:
        """Return the version of each model that an artifact was made from, as far as it is registered, by argument.

        Of several names that one making has, that of the profile.
        """
        read = {}
        for argument in artifact.made_from:
            found = self.of(artifact.inputs[argument], artifact.input_keys.get(argument))
            if found:
                read[argument] = next((each for each in found if is_of(each, profile)), found[0])
        return read

    def give(self, name: str, version: str, alias: str) -> str:
        """Give a version an alias, which no other version of the name then has; say from which one it moved."""
        before = self._client.get_registered_model(name).aliases.get(alias)
        self._client.set_registered_model_alias(name, alias, version)
        return f"{name}@{alias}: {f'v{before} -> ' if before else ''}v{version}"

    def new_version(self, artifact: Artifact, name: str, model_id: str, run: Any) -> Any:
        """Register a logged model. The tags come with the version, so there is never one without them."""
        from mlflow.exceptions import MlflowException

        try:
            self._client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        links = made_from(artifact, self.inputs_of(artifact, str(profile_of(name, artifact.stage))), run)
        made = self._client.create_model_version(
            name,
            f"models:/{model_id}",
            run.info.run_id,
            version_tags(artifact),
            description=description(artifact, links),
            model_id=model_id,
        )
        model = self._client.get_logged_model(model_id)
        shown = [*json.loads(model.tags.get(SHOWN, "[]")), {"name": name, "version": made.version}]
        self._client.set_logged_model_tags(model_id, {SHOWN: json.dumps(shown)})
        return made

    def upload(self, artifact: Artifact, run_id: str) -> str:
        """Return the id of a logged model with the artifact's files, going on with one that was begun and not ended.

        One that another profile registered serves this one too.
        """
        ready = [model_id_of(found) for found in self.of(artifact.digest, artifact.key) if found.status == "READY"]
        begun = self._client.search_logged_models([self._experiment_id], same(artifact))
        ready += [str(model.model_id) for model in begun if model.status == "READY"]
        if ready:
            return ready[0]
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
        self._client.finalize_logged_model(model.model_id, "READY")
        return str(model.model_id)

    def link(self, run: Any, artifact: Artifact, dataset: Dataset | None, profile: str, version: Any = None) -> None:
        """Tie a run to the data set and models it read and the model it made, in MLflow's own terms.

        version: the model's, where it made one. The run's tag rrlhf.digest says that this is done; it waits until all
        inputs are registered.
        """
        from mlflow.entities import LoggedModelInput, LoggedModelOutput, RunTag

        run_id, tags = run.info.run_id, run.data.tags
        model_id = model_id_of(version) if version else None
        if tags.get("rrlhf.digest") == artifact.digest and tags.get("rrlhf.model") == (model_id or ""):
            return
        run = self._client.get_run(run_id)
        inputs = self.inputs_of(artifact, profile)
        read = {model_id_of(found) for found in inputs.values()}
        new = read - {entry.model_id for entry in run.inputs.model_inputs}  # MLflow refuses to write one twice
        datasets = [dataset_input(dataset)] if dataset else []
        self._client.log_inputs(run_id, datasets, [LoggedModelInput(each) for each in sorted(new)])
        if model_id and model_id not in {entry.model_id for entry in run.outputs.model_outputs}:
            step = int(artifact.metrics.get("step", 0))
            self._client.log_outputs(run_id, [LoggedModelOutput(model_id, step)])
            write_metrics(self._client, run_id, model_metrics(run, dataset, model_id))
        if len(inputs) == len(artifact.made_from):
            links = made_from(artifact, inputs, run)
            told = note(artifact, links)
            if version:
                self._client.set_logged_model_tags(model_id, told)
                self._client.update_model_version(version.name, str(version.version), description(artifact, links))
            done = {"rrlhf.digest": artifact.digest, "rrlhf.model": model_id or "", **told}
            self._client.log_batch(run_id, tags=[RunTag(name, value) for name, value in done.items()])

    def keep_files(self, run: Any, artifact: Artifact, dataset: Dataset | None, profile: str) -> None:
        """Keep the files of an artifact that is no model (the evaluation) with its run."""
        if run.data.tags.get("rrlhf.digest") == artifact.digest:
            return
        with linked_files(artifact) as folder, long_requests():
            self._client.log_artifacts(run.info.run_id, str(folder))
        self.link(run, artifact, dataset, profile)


def every(search: Callable[..., Any]) -> list[Any]:
    """Return what a search finds on all its pages."""
    page = search()
    found = [*page]
    while page.token:
        page = search(page_token=page.token)
        found += page
    return found


def same(artifact: Artifact) -> str:
    """Return the condition that a run or logged model is of this making and content."""
    return f"{has('key', artifact.key)} and {has('digest', artifact.digest)}"


def is_of(version: Any, profile: str) -> bool:
    """Whether a version has the name of this profile's models."""
    return profile_of(version.name, json.loads(version.tags[MADE])["stage"]) == profile
