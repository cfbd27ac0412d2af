"""Models: logged models that hold files, registered versions that name them, and the links to what made them.

What the server keeps of an artifact can be held against the artifact: tags, links, and copies of files.
"""

import hashlib
import json
import platform
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

from rrlhf.memo import sha256
from rrlhf.pipeline.artifacts import CARD, SIGNATURE, Artifact
from rrlhf.pipeline.cards import title, what, without_front_matter
from rrlhf.pipeline.stages import spec_of
from rrlhf.pipeline.tracking.runs import dataset_input, has, short_digest, stage_tags, write_metrics
from rrlhf.pipeline.tracking.server import Client, TrackingError
from rrlhf.types import Dataset, Json

INSIDE = "artifact"  # folder of an artifact's files inside a logged model, next to MLflow's own MLmodel
LOADED = "registered_model_meta"  # MLflow's note beside a copy on this machine that it loaded: name and version
MADE = "rrlhf.made"  # tag of a version: its stage, digest, inputs and commit, as JSON
MLMODEL = "rrlhf.mlmodel"  # tag of a logged model: the sha256 of the MLmodel that was written for it
GATES = "rrlhf.gates"  # start of the tags that tell the last decision
PROMOTED = "rrlhf.promoted"  # of the tag that lets a version have an alias: "<file of the evidence> <its sha256>"
LETTERS_PER_TAG = 8000  # MLflow's limit


class Models:
    """The logged models of one experiment and the registry of its server."""

    def __init__(self, client: Client, experiment_id: str) -> None:
        self._client, self._experiment_id = client, experiment_id

    def search(self, condition: str = "") -> list[Any]:  # mlflow.entities.model_registry.ModelVersion
        """Return the matching versions that this package registered, newest first."""
        found = every(partial(self._client.search_model_versions, condition))
        ours = [each for each in found if MADE in each.tags]
        return sorted(ours, key=lambda each: (each.creation_timestamp, int(each.version)), reverse=True)

    def aliases(self) -> dict[tuple[str, str], tuple[str, ...]]:
        """Return the aliases of every version that has some; a search for versions does not tell them."""
        aliases: dict[tuple[str, str], tuple[str, ...]] = {}
        for model in every(self._client.search_registered_models):
            for alias, number in sorted(model.aliases.items()):
                aliases[model.name, str(number)] = (*aliases.get((model.name, str(number)), ()), alias)
        return aliases

    def of(self, digest: str, key: str | None) -> list[Any]:
        """Return the versions of a content and its making, newest first; no key: of any making."""
        found = self.search(has("key", key) if key else "")
        return [each for each in found if json.loads(each.tags[MADE])["digest"] == digest]

    def version_of(self, artifact: Artifact, name: str) -> Any:  # mlflow.entities.model_registry.ModelVersion | None
        """Return the version of an artifact under this name, with its aliases."""
        found = [each for each in self.of(artifact.digest, artifact.key) if each.name == name]
        return self._client.get_model_version(name, str(found[0].version)) if found else None

    def inputs_of(self, artifact: Artifact) -> set[str]:
        """Return the ids of the models that an artifact was made from, as far as they are registered."""
        read = [self.of(artifact.inputs[name], artifact.input_keys.get(name)) for name in artifact.made_from]
        return {model_id_of(found[0]) for found in read if found}

    def give(self, name: str, version: str, alias: str) -> str:
        """Give a version an alias, which no other version of the name then has; say from which one it moved."""
        before = self._client.get_registered_model(name).aliases.get(alias)
        self._client.set_registered_model_alias(name, alias, version)
        return f"{name}@{alias}: {f'v{before} -> ' if before else ''}v{version}"

    def keep_decision(self, version: Any, evidence: Mapping[str, Json], file: str, tags: Mapping[str, str]) -> None:
        """Keep the evidence of a decision as a file of the version's run, and its short form as the version's tags.

        The tags are those of the last decision; the files of earlier ones stay.
        """
        found = self._client.get_model_version(version.name, version.version)
        text = json.dumps(evidence, indent=1)
        self._client.log_text(found.run_id, text, file)
        earned = f"{PROMOTED}.{evidence['to']}"
        if evidence["decision"] != "refused":
            tags = {**tags, earned: f"{file} {hashlib.sha256(text.encode()).hexdigest()}"}
        for tag in found.tags:
            if (tag.startswith(GATES) or tag == earned) and tag not in tags:
                self._client.delete_model_version_tag(version.name, version.version, tag)
        for tag, value in tags.items():
            self._client.set_model_version_tag(version.name, version.version, tag, value)

    def alias_fault(self, version: Any, alias: str) -> str | None:
        """Say why a version should not have an alias that runs do not give, or None.

        The evidence must be there, unchanged and its own.
        """
        earned = version.tags.get(f"{PROMOTED}.{alias}")
        if earned is None:
            return f"alias {alias}: no decision gave it; `rrlhf promote --to {alias}` holds it against the gates"
        file, _, expected = earned.rpartition(" ")
        with tempfile.TemporaryDirectory(prefix="rrlhf-evidence-") as beside:
            try:
                text = Path(self._client.download_artifacts(version.run_id, file, beside)).read_bytes()
            except (OSError, TrackingError):
                return f"alias {alias}: its evidence {file} is gone"
        if (found := hashlib.sha256(text).hexdigest()) != expected:
            return f"alias {alias}: its evidence {file}: expected sha256 {expected}, found {found}"
        if (digest := json.loads(text)["digest"]) != json.loads(version.tags[MADE])["digest"]:
            return f"alias {alias}: its evidence {file} is that of {digest}"
        return None

    def new_version(self, artifact: Artifact, name: str, run_id: str) -> Any:
        """Register an artifact's files. The tags come with the version, so there is never one without them."""
        model_id = self._upload(artifact, run_id)
        if not self._client.search_registered_models(f"name = '{name}'"):
            self._client.create_registered_model(name)
        said = f"{title(artifact.manifest)}. {what(artifact.manifest)}"
        return self._client.create_model_version(
            name, f"models:/{model_id}", run_id, version_tags(artifact), description=said, model_id=model_id
        )

    def _upload(self, artifact: Artifact, run_id: str) -> str:
        """Return the id of a logged model with the artifact's files, going on with one that was begun and not ended.

        One that another profile registered serves this one too.
        """
        if ready := self._models(artifact):
            return str(ready[0].model_id)
        begun = self._client.search_logged_models([self._experiment_id], same(artifact))
        tags = stage_tags(artifact.name, artifact.stage, artifact.key) | note(artifact)
        tags |= {"rrlhf.digest": artifact.digest}
        new = partial(self._client.create_logged_model, self._experiment_id, artifact.name, run_id, tags)
        model = begun[0] if begun else new(model_type=artifact.stage)
        self._client.log_model_artifacts(model.model_id, str(artifact.path), INSIDE)
        with tempfile.TemporaryDirectory(prefix="rrlhf-upload-") as beside:
            description = Path(beside, "MLmodel")
            _write_mlmodel(description, str(model.model_id), run_id, artifact.stage)
            self._client.set_logged_model_tags(model.model_id, {MLMODEL: sha256(description)})
            self._client.log_model_artifact(model.model_id, str(description))
        self._client.finalize_logged_model(model.model_id, "READY")
        return str(model.model_id)

    def link(self, run: Any, artifact: Artifact, dataset: Dataset | None, model_id: str = "") -> None:
        """Tie a run to the data set and models it read and the model it made, in MLflow's own terms.

        The run's tag rrlhf.digest says that this is done; it waits until all inputs are registered.
        """
        from mlflow.entities import LoggedModelInput, LoggedModelOutput, RunTag

        run_id, done = run.info.run_id, {"rrlhf.digest": artifact.digest, "rrlhf.model": model_id}
        if done.items() <= run.data.tags.items():
            return
        run = self._client.get_run(run_id)
        read = self.inputs_of(artifact)
        new = read - {entry.model_id for entry in run.inputs.model_inputs}  # MLflow refuses to write one twice
        datasets = [dataset_input(dataset)] if dataset else []
        self._client.log_inputs(run_id, datasets, [LoggedModelInput(each) for each in sorted(new)])
        if model_id and model_id not in {entry.model_id for entry in run.outputs.model_outputs}:
            step = int(artifact.metrics.get("step", 0))
            self._client.log_outputs(run_id, [LoggedModelOutput(model_id, step)])
            write_metrics(self._client, run_id, model_metrics(run, dataset, model_id))
        makings = {(artifact.inputs[name], artifact.input_keys.get(name)) for name in artifact.made_from}
        if len(read) == len(makings):
            tags = [RunTag(name, value) for name, value in (done | note(artifact)).items()]
            self._client.log_batch(run_id, tags=tags)

    def keep_files(self, run: Any, artifact: Artifact) -> None:
        """Keep the files of an artifact that is no model (the evaluation) with its run."""
        if run.data.tags.get("rrlhf.digest") != artifact.digest:
            self._client.log_artifacts(run.info.run_id, str(artifact.path))

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

    def unregistered(self) -> dict[str, Path]:
        """Return the folders here of all logged models that no version names, by their ids."""
        named = {model_id_of(each) for each in every(self._client.search_model_versions)}
        search = partial(self._client.search_logged_models, [self._experiment_id])
        places = {model.model_id: Path(unquote(urlparse(model.artifact_location).path)) for model in every(search)}
        return {model: place.parent for model, place in places.items() if model not in named and place.is_dir()}

    def delete(self, model_id: str) -> None:
        """Have MLflow forget a logged model; its files are the caller's."""
        self._client.delete_logged_model(model_id)

    def mlmodel_digest(self, artifact: Artifact) -> str | None:
        """Return the sha256 that the MLmodel beside an artifact's copy had when it was written, where that is known."""
        return next((found.tags[MLMODEL] for found in self._models(artifact) if MLMODEL in found.tags), None)

    def run_fault(self, artifact: Artifact, run_id: str) -> str | None:
        """Say what MLflow tells otherwise of the run that made an artifact: tags, last numbers, or inputs; or None."""
        run = self._client.get_run(run_id)
        expected: dict[str, Any] = stage_tags(artifact.name, artifact.stage, artifact.key)
        linked = run.data.tags.get("rrlhf.digest")  # links wait for inputs that are not registered yet
        expected |= {} if linked is None else {"rrlhf.digest": artifact.digest}
        expected |= {name: float(value) for name, value in artifact.metrics.items() if name not in {"step", "seconds"}}
        for name, value in expected.items():
            found = {**run.data.metrics, **run.data.tags}.get(name)
            if repr(found) != repr(value):  # NaN is what it is
                return f"run {run_id}: {name}: expected {value}, found {found}"
        if linked is None:
            return None
        tags = [self._client.get_logged_model(entry.model_id).tags for entry in run.inputs.model_inputs]
        keys = artifact.input_keys
        read = {(each.get("rrlhf.digest"), each.get("rrlhf.key") if keys else None) for each in tags}
        made_from = {(artifact.inputs[name], keys.get(name)) for name in artifact.made_from}
        return None if read == made_from else f"run {run_id}: expected links to {made_from}, found {read}"

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


def model_id_of(registered: Any) -> str:  # mlflow.entities.model_registry.ModelVersion
    """Return the id of the logged model behind a registered version."""
    return str(registered.source).removeprefix("models:/")


def version_tags(artifact: Artifact) -> dict[str, str]:
    """Return the tags of a registered version: what people and searches look for, and in one what lineage reads."""
    made = {
        "stage": artifact.stage,
        "digest": artifact.digest,
        "inputs": artifact.inputs,
        "input_keys": artifact.input_keys,
        "git_commit": artifact.manifest["git_commit"],
    }
    data = artifact.manifest["dataset"].get("name")
    return {
        "rrlhf.node": artifact.name,
        **({"rrlhf.data": data} if data else {}),
        "rrlhf.key": artifact.key,
        MADE: json.dumps(made),
    }


def tag_fault(artifact: Artifact, tags: dict[str, str]) -> str | None:
    """Say which tag of a registered version is not what its artifact says, or None."""
    for name, value in version_tags(artifact).items():
        if tags.get(name) != value:
            return f"its tag {name}: expected {value}, found {tags.get(name)}"
    return None


def note(artifact: Artifact) -> dict[str, str]:
    """Return an artifact's card as the tag that MLflow's pages of a run and of a logged model show as its description.

    A card that is longer than a tag may be ends with where the rest is.
    """
    path = artifact.path / CARD
    if not path.is_file():
        return {}
    text = without_front_matter(path.read_text(encoding="utf-8"))
    if len(text) > LETTERS_PER_TAG:
        rest = f"\n\n(The rest is in {INSIDE}/{CARD}.)"
        text = text[: LETTERS_PER_TAG - len(rest)].rpartition("\n")[0] + rest
    return {"mlflow.note.content": text}


def model_metrics(run: Any, dataset: Dataset | None, model_id: str) -> list[Any]:
    """Return a run's last numbers as those of its model, for MLflow's list of models.

    With the times at which the run has them: they are the same points to MLflow, not new ones.
    """
    from mlflow.entities import Metric

    about = (dataset.name, short_digest(dataset)) if dataset else (None, None)
    return [Metric(m.key, m.value, m.timestamp, m.step, model_id, *about) for m in run.data.to_proto().metrics]


def _write_mlmodel(path: Path, model_id: str, run_id: str, stage: str) -> None:
    """Write MLflow's description of a model, which `mlflow.pyfunc.load_model` reads."""
    from mlflow.models import Model

    model = Model(artifact_path=INSIDE, run_id=run_id, model_id=model_id, model_uuid=model_id)
    if spec_of(stage).makes == "language model":
        model.add_flavor(
            "python_function", loader_module="rrlhf.loader", data=INSIDE, python_version=platform.python_version()
        )
    model.save(path)
