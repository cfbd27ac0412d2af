"""MLflow, the memory: every flow and stage is a run, every trained model a registered version, linked to its inputs.

Training never waits for this module, and registering never trains: a version is looked up by the key and the digest
of its artifact, so a new or emptied server is filled again from the artifacts. Only this module imports mlflow, and
only when something is asked of it, because that import takes seconds.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import re
import socket
import sqlite3
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from rrlhf.artifacts import MANIFEST, Artifact
from rrlhf.config import Params
from rrlhf.keys import canonical
from rrlhf.stages import DATA, Node
from rrlhf.types import Dataset, Log

MODEL_NAMES = {"sft": "rrlhf-sft", "reward": "rrlhf-reward", "ensemble": "rrlhf-ensemble", "ppo": "rrlhf-policy"}
GENERATES = {"sft", "ppo"}  # stages whose artifact is a transformers folder, which rrlhf.loader can load

INSIDE = "artifact"  # folder of an artifact's files inside a logged model, next to MLflow's own MLmodel

SECONDS_BETWEEN_WRITES = 3.0
SILENCE = 10  # a write that took t seconds is followed by at least 10 t without one: training loses a tenth at most
SECONDS_TO_ANSWER = 2
SECONDS_TO_UPLOAD = 600
METRICS_PER_CALL, PARAMS_PER_CALL = 1000, 100  # MLflow's limits

ENVIRONMENT = {
    "DO_NOT_TRACK": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",  # the default of 7 blocks for four minutes when the server is down
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}

_transfer = threading.Lock()


class TrackingError(Exception):
    """The tracking server does not answer or refuses; the message says how to go on."""


class Registered(NamedTuple):
    """A registered version, and whether this call made it."""

    name: str
    version: str
    created: bool


class Version(NamedTuple):
    """A registered version as MLflow tells it; the tags hold its identity and its inputs."""

    name: str
    version: str
    aliases: tuple[str, ...]
    tags: dict[str, str]


class Tracker:
    """One experiment on one tracking server. Made by `connect`."""

    def __init__(self, root: Path, uri: str, experiment_id: str) -> None:
        from mlflow import MlflowClient

        self._root, self._uri, self._experiment_id = root, uri, experiment_id
        self._client: Any = MlflowClient(tracking_uri=uri, registry_uri=uri)

    @classmethod
    def connect(cls, root: Path, experiment: str) -> Tracker:
        """Open the server of MLFLOW_TRACKING_URI, or else `root`/mlflow.db; create what is missing.

        Raises TrackingError when the server does not answer at once, or refuses.
        """
        root = root.resolve()
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{root / 'mlflow.db'}"
        with _trouble(uri):
            artifacts = None
            if uri.startswith("sqlite:///"):
                database = Path(uri.removeprefix("sqlite:///")).absolute()
                _create_database(database)
                _check_database(database)
                artifacts = (database.parent / "mlartifacts").as_uri()
            elif uri.startswith("http"):
                _check_answer(uri)
            _use(uri)
            return cls(root, uri, _experiment_id(uri, experiment, artifacts))

    def start_flow(self, profile: str, params: Params, commit: str | None) -> str:
        """Open the run that the runs of the flow's stages belong to, and return its id."""
        with _trouble(self._uri):
            self._close_dead_runs()
            tags = _process_tags() | {"rrlhf.profile": profile} | _commit_tags(commit)
            return self._new_run(profile, tags, params.model_dump())

    def finish_flow(self, run_id: str, status: str) -> None:
        """Close a flow's run as FINISHED, FAILED or KILLED."""
        with _trouble(self._uri):
            self._client.set_terminated(run_id, status)

    @contextmanager
    def stage_run(self, parent: str | None, node: Node, key: str) -> Iterator[Log]:
        """Open a run for a stage that computes, and yield its log.

        A server that is away costs a little time and nothing else: rows wait for it, and `register` writes anew
        what never arrived.
        """
        tags = _process_tags() | _stage_tags(node.name, node.stage, key)
        run_id = None
        try:
            run_id = self._new_run(node.name, tags, node.settings, parent=parent)
        except _errors() as error:
            _warn(node.name, error)
        live = _LiveRun(self._client, run_id, node.name)
        status = "FAILED"
        try:
            yield live.log
            status = "FINISHED"
        except KeyboardInterrupt:
            status = "KILLED"
            raise
        finally:
            live.finish(status)

    def register(
        self,
        artifact: Artifact,
        dataset: Dataset | None,
        *,
        aliases: Iterable[str] = (),
        parent: str | None = None,
    ) -> Registered | None:
        """Make sure that the server knows an artifact: its run with every number, its version, links and aliases.

        What is there already stays; what a killed process left half done is finished. A stage without a model (the
        evaluation) gets its run and files only, and the answer is None. `parent` is where a missing run is put.
        """
        with _locked(self._root / ".rrlhf" / "registering" / artifact.key), _trouble(self._uri):
            run = self._complete_run(artifact, parent)
            if artifact.stage not in MODEL_NAMES:
                self._keep_files(run, artifact, dataset)
                return None
            name = MODEL_NAMES[artifact.stage]
            found = self._version_of(artifact)
            created = found is None
            if created:
                model_id = self._uploaded_model(artifact, run.info.run_id)
                found = self._new_version(name, model_id, run.info.run_id, _version_tags(artifact, dataset))
            self._link(run, artifact, dataset, _model_id(found))
            for alias in set(aliases) - set(found.aliases):
                self._client.set_registered_model_alias(name, alias, str(found.version))
            return Registered(name, str(found.version), created)

    def restore(self, stage: str, key: str, to: Path) -> bool:
        """Download the artifact that was registered with this key into the new folder `to`; False if there is none."""
        from mlflow.artifacts import download_artifacts

        if stage not in MODEL_NAMES:
            return False
        with _trouble(self._uri):
            found = self._search_versions(f"name = '{MODEL_NAMES[stage]}' and {_has('key', key)}")
            if not found:
                return False
            to.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=to.parent, prefix=".restoring-") as beside, _long_requests():
                uri = f"models:/{found[0].name}/{found[0].version}/{INSIDE}"
                download_artifacts(artifact_uri=uri, dst_path=beside, tracking_uri=self._uri)
                (Path(beside) / INSIDE).rename(to)
            return True

    def versions(self) -> list[Version]:
        """Return every version that this project registered, newest first."""
        with _trouble(self._uri):
            known = [found for found in self._search_versions("") if "rrlhf.digest" in found.tags]
            aliases = self._aliases()
        return [
            Version(found.name, str(found.version), aliases.get((found.name, str(found.version)), ()), dict(found.tags))
            for found in known
        ]

    def log_report(self, run_id: str, html: Path) -> None:
        """Keep a report with a run."""
        with _trouble(self._uri), _long_requests():
            self._client.log_artifact(run_id, str(html))

    # --- runs

    def _new_run(
        self,
        name: str,
        tags: Mapping[str, str],
        settings: Mapping[str, Any],
        *,
        parent: str | None = None,
        started: int | None = None,
    ) -> str:
        above = {"mlflow.parentRunId": parent} if parent else {}
        run = self._client.create_run(self._experiment_id, started, {**tags, **above}, name)
        run_id: str = run.info.run_id
        _write_params(self._client, run_id, settings)
        return run_id

    def _close_dead_runs(self) -> None:
        """Close the runs of this machine's processes that were killed: MLflow shows them as RUNNING for ever."""
        unfinished = f"attributes.status = 'RUNNING' and {_has('host', socket.gethostname())}"
        for run in self._client.search_runs([self._experiment_id], unfinished):
            if not _is_alive(int(run.data.tags["rrlhf.pid"])):
                self._client.set_terminated(run.info.run_id, "KILLED")

    def _complete_run(self, artifact: Artifact, parent: str | None) -> Any:  # mlflow.entities.Run
        """Return the run that holds all of the artifact's history; write one when there is none."""
        runs = self._client.search_runs([self._experiment_id], _has("key", artifact.key))
        rows = artifact.history()
        for run in runs:
            if run.info.status == "FINISHED" and run.data.tags.get("rrlhf.rows") == str(len(rows)):
                return run
        for run in runs:
            if run.info.status == "RUNNING":
                self._client.set_terminated(run.info.run_id, "KILLED")
        return self._replay(artifact, rows, parent)

    def _replay(self, artifact: Artifact, rows: list[dict[str, float]], parent: str | None) -> Any:
        """Write a run from an artifact's history, at the times at which it happened."""
        manifest = artifact.manifest
        ended = datetime.fromisoformat(manifest["created"]).timestamp()
        started = ended - manifest["seconds"]
        tags = _stage_tags(artifact.name, artifact.stage, artifact.key) | _commit_tags(manifest["git_commit"])
        run_id = self._new_run(
            artifact.name, tags, manifest["document"]["params"], parent=parent, started=round(1000 * started)
        )
        metrics = [metric for row in rows for metric in _metrics(row, started + row.get("seconds", 0.0))]
        _write_metrics(self._client, run_id, metrics)
        _finish(self._client, run_id, len(rows), round(1000 * ended))
        return self._client.get_run(run_id)

    def _keep_files(self, run: Any, artifact: Artifact, dataset: Dataset | None) -> None:
        if run.data.tags.get("rrlhf.digest") == artifact.digest:
            return
        with _linked_files(artifact) as folder, _long_requests():
            self._client.log_artifacts(run.info.run_id, str(folder))
        self._link(run, artifact, dataset, None)

    # --- models

    def _search_versions(self, condition: str) -> list[Any]:  # mlflow.entities.model_registry.ModelVersion
        """Return the matching versions, newest first."""
        found: list[Any] = []
        token = None
        while True:
            page = self._client.search_model_versions(condition, page_token=token)
            found += page
            token = page.token
            if not token:
                return sorted(found, key=lambda each: (each.creation_timestamp, int(each.version)), reverse=True)

    def _aliases(self) -> dict[tuple[str, str], tuple[str, ...]]:
        """Return the aliases of every version that has some; a search for versions does not tell them."""
        aliases: dict[tuple[str, str], tuple[str, ...]] = {}
        for model in self._client.search_registered_models():
            for alias, number in sorted(model.aliases.items()):
                aliases[model.name, str(number)] = (*aliases.get((model.name, str(number)), ()), alias)
        return aliases

    def _version_of(self, artifact: Artifact) -> Any:  # mlflow.entities.model_registry.ModelVersion | None
        """Return the version of an artifact; one that never became ready is removed."""
        same = f"name = '{MODEL_NAMES[artifact.stage]}' and {_has('key', artifact.key)}"
        for found in self._search_versions(f"{same} and {_has('digest', artifact.digest)}"):
            if found.status == "READY":
                # A search does not tell aliases.
                return self._client.get_model_version(found.name, str(found.version))
            self._client.delete_model_version(found.name, str(found.version))
        return None

    def _new_version(self, name: str, model_id: str, run_id: str, tags: dict[str, str]) -> Any:
        """Register a logged model. The tags come with the version, so there is never one without them."""
        from mlflow.exceptions import MlflowException

        try:
            self._client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        made = self._client.create_model_version(name, f"models:/{model_id}", run_id, tags, model_id=model_id)
        shown = [{"name": name, "version": made.version}]  # MLflow's page of the logged model reads this tag
        self._client.set_logged_model_tags(model_id, {"mlflow.modelVersions": json.dumps(shown)})
        return made

    def _uploaded_model(self, artifact: Artifact, run_id: str) -> str:
        """Return the id of a logged model with the artifact's files, going on with one that was begun and not ended."""
        same = f"{_has('key', artifact.key)} and {_has('digest', artifact.digest)}"
        begun = self._client.search_logged_models([self._experiment_id], same)
        if any(model.status == "READY" for model in begun):
            return next(str(model.model_id) for model in begun if model.status == "READY")
        tags = {"rrlhf.digest": artifact.digest} | _stage_tags(artifact.name, artifact.stage, artifact.key)
        model = (
            begun[0]
            if begun
            else self._client.create_logged_model(
                self._experiment_id, artifact.name, run_id, tags, model_type=artifact.stage
            )
        )
        with _linked_files(artifact, INSIDE) as folder, _long_requests():
            _write_mlmodel(folder, model.model_id, run_id, artifact.stage)
            self._client.log_model_artifacts(model.model_id, str(folder))
        self._client.finalize_logged_model(model.model_id, "READY")
        return str(model.model_id)

    def _link(self, run: Any, artifact: Artifact, dataset: Dataset | None, model_id: str | None) -> None:
        """Tie a run to the data set and models it read and the model it made, in MLflow's own terms.

        The run's tag rrlhf.digest says that this is done; it waits until all inputs are registered.
        """
        from mlflow.entities import LoggedModelInput, LoggedModelOutput, RunTag

        run_id, tags = run.info.run_id, run.data.tags
        if tags.get("rrlhf.digest") == artifact.digest and tags.get("rrlhf.model") == (model_id or ""):
            return
        run = self._client.get_run(run_id)
        digests = [digest for name, digest in artifact.inputs.items() if name != DATA]
        read = {_model_id(found[0]) for digest in digests if (found := self._search_versions(_has("digest", digest)))}
        new = read - {entry.model_id for entry in run.inputs.model_inputs}  # MLflow refuses to write one twice
        datasets = [_dataset_input(dataset)] if dataset else []
        self._client.log_inputs(run_id, datasets, [LoggedModelInput(each) for each in sorted(new)])
        if model_id and model_id not in {entry.model_id for entry in run.outputs.model_outputs}:
            step = int(artifact.metrics.get("step", 0))
            self._client.log_outputs(run_id, [LoggedModelOutput(model_id, step)])
            _write_metrics(self._client, run_id, _model_metrics(run, dataset, model_id))
        if len(read) == len(set(digests)):
            done = {"rrlhf.digest": artifact.digest, "rrlhf.model": model_id or ""}
            self._client.log_batch(run_id, tags=[RunTag(name, value) for name, value in done.items()])


class _LiveRun:
    """A run that is written to while its stage computes."""

    def __init__(self, client: Any, run_id: str | None, name: str) -> None:
        self._client, self._run_id, self._name = client, run_id, name
        self._waiting: list[Any] = []  # mlflow.entities.Metric
        self._rows = 0
        self._due = time.monotonic() + SECONDS_BETWEEN_WRITES
        self._warned = run_id is None

    def log(self, row: dict[str, float]) -> None:
        """Take a row, and write all that wait when it is time."""
        self._rows += 1
        self._waiting += _metrics(row, time.time())
        if time.monotonic() >= self._due:
            self._write()

    def finish(self, status: str) -> None:
        """Write what waits and close the run, if the server answers."""
        if not self._write() or self._run_id is None:
            return
        try:
            if status == "FINISHED":
                _finish(self._client, self._run_id, self._rows, round(1000 * time.time()))
            else:
                self._client.set_terminated(self._run_id, status)
        except _errors() as error:
            _warn(self._name, error)

    def _write(self) -> bool:
        """Write the waiting numbers; False when the server did not take them. Writing one twice changes nothing."""
        start = time.monotonic()
        done = self._run_id is not None
        try:
            if done:
                _write_metrics(self._client, str(self._run_id), self._waiting)
            self._waiting.clear()
        except _errors() as error:
            done = False
            if not self._warned:
                _warn(self._name, error)
                self._warned = True
        end = time.monotonic()
        self._due = end + max(SECONDS_BETWEEN_WRITES, SILENCE * (end - start))
        return done


# --- the server


def _create_database(database: Path) -> None:
    """Make MLflow's tables once: beside, then renamed, because several processes doing it at once crash."""
    if database.exists():
        return
    from mlflow import MlflowClient

    with _locked(database.with_name(f"{database.name}.lock")):
        if database.exists():
            return
        for left in database.parent.glob(f"{database.name}.new*"):
            left.unlink()
        beside = database.with_name(f"{database.name}.new{os.getpid()}")
        MlflowClient(tracking_uri=f"sqlite:///{beside}", registry_uri=f"sqlite:///{beside}")
        beside.rename(database)


def _check_database(database: Path) -> None:
    """Raise TrackingError for a damaged file: MLflow would try to open it again and again, for an hour."""
    try:
        with closing(sqlite3.connect(database)) as connection:
            connection.execute("pragma schema_version")
    except sqlite3.DatabaseError as error:
        raise TrackingError(f"{database}: {error}; remove it, and the next run fills a new one") from None


def _check_answer(uri: str) -> None:
    """Raise TrackingError unless the server answers a first question soon, and does not ask who we are."""
    from mlflow.utils.credentials import get_default_host_creds
    from mlflow.utils.rest_utils import http_request

    answer = http_request(
        get_default_host_creds(uri),
        "/api/2.0/mlflow/experiments/search",
        "GET",
        params={"max_results": 1},
        timeout=SECONDS_TO_ANSWER,
        max_retries=0,
        raise_on_status=False,
    )
    if answer.status_code in {401, 403}:
        raise TrackingError(
            f"the tracking server {_shown(uri)} refuses access ({answer.status_code}): set MLFLOW_TRACKING_USERNAME "
            "and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
        )


def _use(uri: str) -> None:
    """Point MLflow's global client at the server: its registry asks that one about logged models."""
    import mlflow

    given = os.environ.get("MLFLOW_TRACKING_URI")
    mlflow.set_tracking_uri(uri)  # also writes the variable, which would then decide for every other folder
    if given is None:
        os.environ.pop("MLFLOW_TRACKING_URI", None)


def _experiment_id(uri: str, name: str, artifacts: str | None) -> str:
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return str(client.create_experiment(name, artifacts))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            found = client.get_experiment_by_name(name)  # another process was faster
    if found.lifecycle_stage == "deleted":
        raise TrackingError(
            f"the experiment {name!r} was deleted: mlflow experiments restore --experiment-id {found.experiment_id}, "
            "or choose another name in tracking.experiment"
        )
    if artifacts and found.artifact_location != artifacts:
        raise TrackingError(
            f"{uri.removeprefix('sqlite:///')} keeps its models in {found.artifact_location}: the folder was moved or "
            "copied. Remove that mlflow.db; the next run fills a new one from artifacts/"
        )
    return str(found.experiment_id)


def _errors() -> tuple[type[Exception], ...]:
    """Return the errors by which MLflow's client says that the server is away or refuses."""
    from mlflow.exceptions import MlflowException
    from requests import RequestException

    return MlflowException, RequestException


@contextmanager
def _trouble(uri: str) -> Iterator[None]:
    """Turn the client's errors into TrackingError."""
    try:
        yield
    except _errors() as error:
        way_out = (
            "check MLFLOW_TRACKING_URI and start the server again, or unset the variable to use mlflow.db here"
            if uri.startswith("http")
            else "check that the file can be written and that the disk is not full"
        )
        raise TrackingError(
            f"the tracking server {_shown(uri)} failed: {_first_line(error)}\n"
            f"{way_out}; nothing that was computed is lost"
        ) from None  # the client's error shows a password in the address


def _shown(text: str) -> str:
    """Return an address, or a text with addresses, without user names and passwords."""
    return re.sub(r"://[^/@\s]*@", "://", text)


def _first_line(error: Exception) -> str:
    return _shown(str(error).partition("\n")[0])[:300]


def _warn(name: str, error: Exception) -> None:
    print(f"{name}  the tracking server does not answer; the run goes on ({_first_line(error)})", file=sys.stderr)


@contextmanager
def _long_requests() -> Iterator[None]:
    """Give transfers of whole models more time than a question gets; one at a time, for the variable is shared."""
    name = "MLFLOW_HTTP_REQUEST_TIMEOUT"
    with _transfer:
        before = os.environ[name]
        os.environ[name] = str(max(int(before), SECONDS_TO_UPLOAD))
        try:
            yield
        finally:
            os.environ[name] = before


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock that the kernel drops with the process."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


# --- what is written


def _has(name: str, value: str) -> str:
    """Return the condition that a tag of ours has a value."""
    return f"tags.`rrlhf.{name}` = '{value}'"


def _process_tags() -> dict[str, str]:
    return {"rrlhf.host": socket.gethostname(), "rrlhf.pid": str(os.getpid())}


def _stage_tags(name: str, stage: str, key: str) -> dict[str, str]:
    return {"rrlhf.node": name, "rrlhf.stage": stage, "rrlhf.key": key}


def _commit_tags(commit: str | None) -> dict[str, str]:
    return {"rrlhf.git_commit": commit, "mlflow.source.git.commit": commit.removesuffix("-dirty")} if commit else {}


def _version_tags(artifact: Artifact, dataset: Dataset | None) -> dict[str, str]:
    commit = artifact.manifest["git_commit"]
    params = canonical(artifact.manifest["document"]["params"])
    tags = _stage_tags(artifact.name, artifact.stage, artifact.key) | {
        "rrlhf.digest": artifact.digest,
        "rrlhf.inputs": json.dumps(artifact.inputs),
        "rrlhf.params": sha256(params.encode()).hexdigest(),
    }
    if commit:
        tags["rrlhf.git_commit"] = commit
    if dataset:
        tags |= {"rrlhf.dataset": dataset.digest, "rrlhf.dataset_name": dataset.name}
    return tags


def _flat(settings: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, str]]:
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{above}{name}.")
        else:
            yield f"{above}{name}", str(value)


def _metrics(row: Mapping[str, float], when: float) -> list[Any]:
    """Return a row as MLflow's metrics; `seconds` is what `when` says already."""
    from mlflow.entities import Metric

    step = int(row.get("step", 0))
    numbers = {name: value for name, value in row.items() if name not in {"step", "seconds"}}
    return [Metric(name, float(value), round(1000 * when), step) for name, value in numbers.items()]


def _model_metrics(run: Any, dataset: Dataset | None, model_id: str) -> list[Any]:
    """Return a run's last numbers as those of its model, for MLflow's list of models.

    With the times at which the run has them: they are the same points to MLflow, not new ones.
    """
    from mlflow.entities import Metric

    about = (dataset.name, _short(dataset)) if dataset else (None, None)
    return [Metric(m.key, m.value, m.timestamp, m.step, model_id, *about) for m in run.data._metric_objs]


def _write_metrics(client: Any, run_id: str, metrics: list[Any]) -> None:
    for start in range(0, len(metrics), METRICS_PER_CALL):
        client.log_batch(run_id, metrics=metrics[start : start + METRICS_PER_CALL])


def _write_params(client: Any, run_id: str, settings: Mapping[str, Any]) -> None:
    from mlflow.entities import Param

    params = [Param(name, value) for name, value in _flat(settings)]
    for start in range(0, len(params), PARAMS_PER_CALL):
        client.log_batch(run_id, params=params[start : start + PARAMS_PER_CALL])


def _finish(client: Any, run_id: str, rows: int, ended: int) -> None:
    """Close a run that holds all its rows; their number is what tells it from an incomplete one."""
    client.set_tag(run_id, "rrlhf.rows", str(rows))
    client.set_terminated(run_id, "FINISHED", ended)


def _model_id(registered: Any) -> str:  # mlflow.entities.model_registry.ModelVersion
    return str(registered.source).removeprefix("models:/")


def _short(dataset: Dataset) -> str:
    """Return the digest in the 36 characters that MLflow has for one."""
    return dataset.digest.removeprefix("md5:").removesuffix(".dir")[:36]


def _dataset_input(dataset: Dataset) -> Any:  # mlflow.entities.DatasetInput
    from mlflow.entities import Dataset as Entity
    from mlflow.entities import DatasetInput

    source = json.dumps({"digest": dataset.digest, "name": dataset.name})
    return DatasetInput(Entity(dataset.name, _short(dataset), "dvc", source))


@contextmanager
def _linked_files(artifact: Artifact, inside: str = ".") -> Iterator[Path]:
    """Yield a temporary folder of links to exactly the artifact's files: an upload follows them, nothing is copied."""
    with tempfile.TemporaryDirectory(prefix="rrlhf-upload-") as temporary:
        folder = Path(temporary)
        for name in [MANIFEST, *artifact.manifest["files"]]:
            link = folder / inside / name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to((artifact.path / name).resolve())
        yield folder


def _write_mlmodel(folder: Path, model_id: str, run_id: str, stage: str) -> None:
    """Write MLflow's description of a model, which `mlflow.pyfunc.load_model` reads.

    By hand: MLflow's own writer imports all its flavors, for seconds, to write these lines.
    """
    flavor = {"loader_module": "rrlhf.loader", "data": INSIDE, "python_version": platform.python_version()}
    description = {
        "artifact_path": INSIDE,
        "flavors": {"python_function": flavor} if stage in GENERATES else {},
        "mlflow_version": version("mlflow"),
        "model_id": model_id,
        "model_uuid": model_id,
        "run_id": run_id,
        "utc_time_created": str(datetime.now(UTC).replace(tzinfo=None)),
    }
    (folder / "MLmodel").write_text(yaml.safe_dump(description), encoding="utf-8")
