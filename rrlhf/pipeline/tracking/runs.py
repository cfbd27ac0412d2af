"""Runs: one for each flow and each stage, written while it computes or afterwards from an artifact's history."""

from __future__ import annotations

import json
import os
import socket
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from rrlhf.locks import is_alive
from rrlhf.pipeline.artifacts import Artifact
from rrlhf.pipeline.keys import dotted
from rrlhf.pipeline.tracking.server import errors, warn
from rrlhf.policy.excerpts import FILE as EXCERPTS
from rrlhf.policy.excerpts import read_excerpts
from rrlhf.policy.health import EVENTS, in_words
from rrlhf.types import Dataset, Metrics

SECONDS_BETWEEN_WRITES = 3.0
METRICS_PER_CALL, PARAMS_PER_CALL = 1000, 100  # MLflow's limits


def has(name: str, value: str) -> str:
    """Return the condition that a tag of ours has a value."""
    return f"tags.`rrlhf.{name}` = '{value}'"


def stage_tags(name: str, stage: str, key: str) -> dict[str, str]:
    """Return the tags that say what a run or model is, by name and by key."""
    return {"rrlhf.node": name, "rrlhf.stage": stage, "rrlhf.key": key}


def commit_tags(commit: str | None) -> dict[str, str]:
    """Return the git commit as our tag and as MLflow's, which its pages turn into a link."""
    return {"rrlhf.git_commit": commit, "mlflow.source.git.commit": commit.removesuffix("-dirty")} if commit else {}


class Runs:
    """The runs of one experiment."""

    def __init__(self, client: Any, experiment_id: str) -> None:
        self._client, self._experiment_id = client, experiment_id

    def new(
        self,
        name: str,
        tags: Mapping[str, str],
        settings: Mapping[str, Any],
        *,
        parent: str | None = None,
        started: int | None = None,
    ) -> str:
        """Open a run with its settings, below `parent`, begun now or at `started` (ms); return its id."""
        from mlflow.entities import Param

        above = {"mlflow.parentRunId": parent} if parent else {}
        process = {"rrlhf.host": socket.gethostname(), "rrlhf.pid": str(os.getpid())}
        run = self._client.create_run(self._experiment_id, started, {**tags, **process, **above}, name)
        run_id: str = run.info.run_id
        params = [Param(dotted_name, value) for dotted_name, value in dotted(settings)]
        for start in range(0, len(params), PARAMS_PER_CALL):
            self._client.log_batch(run_id, params=params[start : start + PARAMS_PER_CALL])
        return run_id

    def close_dead(self) -> None:
        """Close the runs of this machine's processes that were killed: MLflow shows them as RUNNING for ever."""
        unfinished = f"attributes.status = 'RUNNING' and {has('host', socket.gethostname())}"
        for run in self._client.search_runs([self._experiment_id], unfinished):
            if not is_alive(int(run.data.tags["rrlhf.pid"])):
                self._client.set_terminated(run.info.run_id, "KILLED")

    def complete(self, artifact: Artifact, parent: str | None) -> Any:  # mlflow.entities.Run
        """Return the run that holds all of the artifact's history; write one when there is none."""
        runs = self._client.search_runs([self._experiment_id], has("key", artifact.key))
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
        manifest, settings = artifact.manifest, artifact.manifest["document"]["params"]
        ended = datetime.fromisoformat(manifest["created"]).timestamp()
        started = ended - manifest["seconds"]
        tags = stage_tags(artifact.name, artifact.stage, artifact.key) | commit_tags(manifest["git_commit"])
        run_id = self.new(artifact.name, tags, settings, parent=parent, started=round(1000 * started))
        metrics = [metric for row in rows for metric in to_metrics(row, started + row.get("seconds", 0.0))]
        write_metrics(self._client, run_id, metrics)
        if "health" in settings:
            write_health(self._client, run_id, rows, "FINISHED")
        write_told(self._client, run_id, artifact.path)
        close_finished(self._client, run_id, len(rows), round(1000 * ended))
        return self._client.get_run(run_id)


class LiveRun:
    """A run that is written to while its stage computes, until the server is away."""

    def __init__(self, client: Any, run_id: str | None, name: str, watched: bool) -> None:
        self._client, self._run_id, self._name, self._watched = client, run_id, name, watched
        self._waiting: list[Any] = []  # mlflow.entities.Metric
        self._rows: list[Metrics] = []
        self._due = time.monotonic() + SECONDS_BETWEEN_WRITES

    def log(self, row: Metrics) -> None:
        """Take a row, and write all that wait when it is time."""
        self._rows.append(row)
        self._waiting += to_metrics(row, time.time())
        if time.monotonic() >= self._due:
            self._try(self._write)
            self._due = time.monotonic() + SECONDS_BETWEEN_WRITES

    def finish(self, status: str, folder: Path | None) -> None:
        """Write what waits and what is left in the stage's folder, and close the run."""
        self._try(lambda run_id: self._close(run_id, status, folder))

    def _close(self, run_id: str, status: str, folder: Path | None) -> None:
        self._write(run_id)
        if self._watched:
            write_health(self._client, run_id, self._rows, status)
        if folder:
            write_told(self._client, run_id, folder)
        if status == "FINISHED":
            close_finished(self._client, run_id, len(self._rows), round(1000 * time.time()))
        else:
            self._client.set_terminated(run_id, status)

    def _write(self, run_id: str) -> None:
        write_metrics(self._client, run_id, self._waiting)
        self._waiting.clear()

    def _try(self, write: Callable[[str], None]) -> None:
        """Write to the server; give this run up when it does not answer, for `Runs.complete` writes it anew."""
        if self._run_id is None:
            return
        try:
            write(self._run_id)
        except errors() as error:
            warn(self._name, error)
            self._run_id = None


def to_metrics(row: Mapping[str, float], when: float) -> list[Any]:
    """Return a row as MLflow's metrics; `seconds` is what `when` says already."""
    from mlflow.entities import Metric

    step = int(row.get("step", 0))
    numbers = {name: value for name, value in row.items() if name not in {"step", "seconds"}}
    return [Metric(name, float(value), round(1000 * when), step) for name, value in numbers.items()]


def write_metrics(client: Any, run_id: str, metrics: list[Any]) -> None:
    """Write metrics in as few calls as MLflow allows."""
    for start in range(0, len(metrics), METRICS_PER_CALL):
        client.log_batch(run_id, metrics=metrics[start : start + METRICS_PER_CALL])


def close_finished(client: Any, run_id: str, rows: int, ended: int) -> None:
    """Close a run that holds all its rows; their number is what tells it from an incomplete one."""
    client.set_tag(run_id, "rrlhf.rows", str(rows))
    client.set_terminated(run_id, "FINISHED", ended)


def write_health(client: Any, run_id: str, rows: Iterable[Metrics], status: str) -> None:
    """Tag a run with its training's health; one that ended early is not called healthy."""
    told = in_words(rows)
    if status == "FINISHED" or told != "healthy":
        client.set_tag(run_id, "rrlhf.health", told)


def write_told(client: Any, run_id: str, folder: Path) -> None:
    """Have a run hold the events and the texts that its stage left: as a file, and as a table of MLflow's."""
    told = [name for name in (EVENTS, EXCERPTS) if (folder / name).is_file()]
    there = {entry.path for entry in client.list_artifacts(run_id)} if told else set()
    if EVENTS in told and EVENTS not in there:
        client.log_artifact(run_id, str(folder / EVENTS))
    if EXCERPTS in told and EXCERPTS not in there:
        rows = [vars(row) for row in read_excerpts(folder)]
        columns = {name: [row[name] for row in rows] for name in (rows[0] if rows else ()) if name != "gold"}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of MLflow about pandas 3
            client.log_table(run_id, columns, EXCERPTS)


def short_digest(dataset: Dataset) -> str:
    """Return the digest in the 36 characters that MLflow has for one."""
    return dataset.digest.removeprefix("md5:").removesuffix(".dir")[:36]


def dataset_input(dataset: Dataset) -> Any:  # mlflow.entities.DatasetInput
    """Return a data set as an input of a run in MLflow's own terms."""
    from mlflow.entities import Dataset as Entity
    from mlflow.entities import DatasetInput

    source = json.dumps({"digest": dataset.digest, "name": dataset.name})
    return DatasetInput(Entity(dataset.name, short_digest(dataset), "dvc", source))
