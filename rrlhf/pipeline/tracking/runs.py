"""Runs: one for each flow and each stage, written while it computes or afterwards from an artifact's history."""

import json
import os
import socket
import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from rrlhf.locks import is_alive
from rrlhf.pipeline.artifacts import HISTORY, Artifact, rows_of
from rrlhf.pipeline.keys import dotted
from rrlhf.pipeline.tracking.server import Client, TrackingError
from rrlhf.policy.excerpts import FILE as EXCERPTS
from rrlhf.policy.health import EVENTS, in_words
from rrlhf.progress import say
from rrlhf.types import Dataset, Metrics

SECONDS_BETWEEN_WRITES = 3.0
SECONDS_TO_CLOSE = 2.0  # for which a stage that ended waits for a server
PARENT = "mlflow.parentRunId"
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

    def __init__(self, client: Client, experiment_id: str) -> None:
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
        above = {PARENT: parent} if parent else {}
        process = {"rrlhf.host": socket.gethostname(), "rrlhf.pid": str(os.getpid())}
        run = self._client.create_run(self._experiment_id, started, {**tags, **process, **above}, name)
        run_id: str = run.info.run_id
        self._describe(run_id, settings)
        return run_id

    def _describe(self, run_id: str, settings: Mapping[str, Any]) -> None:
        from mlflow.entities import Param

        params = [Param(dotted_name, value) for dotted_name, value in dotted(settings)]
        for start in range(0, len(params), PARAMS_PER_CALL):
            self._client.log_batch(run_id, params=params[start : start + PARAMS_PER_CALL])

    def close_dead(self) -> None:
        """Close the runs of this machine's processes that were killed: MLflow shows them as RUNNING for ever."""
        unfinished = f"attributes.status = 'RUNNING' and {has('host', socket.gethostname())}"
        for run in self._client.search_runs([self._experiment_id], unfinished):
            if not is_alive(int(run.data.tags["rrlhf.pid"])):
                self._client.set_terminated(run.info.run_id, "KILLED")

    def complete(self, artifact: Artifact, parent: str | None) -> Any:  # mlflow.entities.Run
        """Return the run that holds all of the artifact's history; finish the one below `parent`, or write one."""
        runs = self._client.search_runs([self._experiment_id], has("key", artifact.key))
        rows = artifact.history()
        begun = None
        for run in runs:
            if run.info.status == "FINISHED" and run.data.tags.get("rrlhf.rows") == str(len(rows)):
                return run
            if run.info.status != "FINISHED" and run.data.tags.get(PARENT) == parent:
                begun = run
        return self._replay(artifact, rows, parent, begun)

    def _replay(self, artifact: Artifact, rows: list[dict[str, float]], parent: str | None, begun: Any) -> Any:
        """Write a run from an artifact's history, at the times at which it happened.

        What one that was begun has already are the same points to MLflow, which are not written twice.
        """
        manifest, settings = artifact.manifest, artifact.manifest["document"]["params"]
        ended = datetime.fromisoformat(manifest["created"]).timestamp()
        if begun:
            run_id, started = begun.info.run_id, begun.info.start_time
            self._describe(run_id, settings)
        else:
            started = round(1000 * (ended - manifest["seconds"]))
            tags = stage_tags(artifact.name, artifact.stage, artifact.key) | commit_tags(manifest["git_commit"])
            run_id = self.new(artifact.name, tags, settings, parent=parent, started=started)
        write_metrics(self._client, run_id, [metric for row in rows for metric in to_metrics(row, started)])
        close(self._client, run_id, artifact.path, rows, "health" in settings, ended=round(1000 * ended))
        return self._client.get_run(run_id)


class LiveRun(threading.Thread):
    """Writes what a stage logs into its folder to a run, while it computes; the stage never waits for it.

    What does not arrive, because the server is away, is written when the result is registered.
    """

    def __init__(self, client: Client, open_run: Callable[[int], str], name: str, folder: Path, watched: bool) -> None:
        """open_run: makes the run, which began at that time (ms), and returns its id."""
        super().__init__(name=f"mlflow-{name}", daemon=True)
        self._client, self._open_run, self._stage, self._folder = client, open_run, name, folder
        self._watched, self._run_id, self._told = watched, "", False
        self._rows: list[Metrics] = []  # that are written
        before = rows_of(folder) if (folder / HISTORY).is_file() else []  # of an interrupted run, whose clock goes on
        self._began = round(1000 * (time.time() - (before[-1]["seconds"] if before else 0.0)))
        self._status, self._over = "", threading.Event()

    def finish(self, status: str, folder: Path, seconds: float | None) -> None:
        """Have the run closed with what lies in `folder` now, waiting so many seconds; None: as long as it takes."""
        self._status, self._folder = status, folder
        self._over.set()
        self.join(seconds)

    def run(self) -> None:
        """Write now and then until the stage is over, and close the run."""
        is_over = False
        while not is_over:
            is_over = self._over.wait(SECONDS_BETWEEN_WRITES)
            try:
                self._write()
                if is_over:
                    close(self._client, self._run_id, self._folder, self._rows, self._watched, self._status)
            except (TrackingError, OSError) as error:  # OSError: published at this moment
                if not self._told:
                    say(f"{self._stage}  {str(error).partition(chr(10))[0]}; the run goes on")
                self._told = True

    def _write(self) -> None:
        self._run_id = self._run_id or self._open_run(self._began)
        if self._status == "FINISHED" or (self._folder / HISTORY).is_file():
            rows = rows_of(self._folder)
            new = [metric for row in rows[len(self._rows) :] for metric in to_metrics(row, self._began)]
            write_metrics(self._client, self._run_id, new)
            self._rows = rows


def to_metrics(row: Mapping[str, float], started: int) -> list[Any]:
    """Return a row as MLflow's metrics of a run that began at this time (ms)."""
    from mlflow.entities import Metric

    step, when = int(row.get("step", 0)), started + round(1000 * row.get("seconds", 0.0))
    numbers = {name: value for name, value in row.items() if name not in {"step", "seconds"}}
    return [Metric(name, float(value), when, step) for name, value in numbers.items()]


def write_metrics(client: Client, run_id: str, metrics: list[Any]) -> None:
    """Write metrics in as few calls as MLflow allows."""
    for start in range(0, len(metrics), METRICS_PER_CALL):
        client.log_batch(run_id, metrics=metrics[start : start + METRICS_PER_CALL])


def close(
    client: Client,
    run_id: str,
    folder: Path,
    rows: Sequence[Metrics],
    watched: bool,
    status: str = "FINISHED",
    ended: int | None = None,
) -> None:
    """Close a run, now or at `ended` (ms), with what its stage left in a folder, and its health if that was watched.

    A training that ended early is not called healthy. The number of rows tells a finished run from an incomplete one.
    """
    is_finished, health = status == "FINISHED", in_words(rows) if watched else ""
    if health and (is_finished or health != "healthy"):
        client.set_tag(run_id, "rrlhf.health", health)
    _write_told(client, run_id, folder)
    if is_finished:
        client.set_tag(run_id, "rrlhf.rows", str(len(rows)))
    client.set_terminated(run_id, status, ended)


def _write_told(client: Client, run_id: str, folder: Path) -> None:
    """Have a run hold the events and the texts that its stage left: as a file, and as a table of MLflow's."""
    told = [name for name in (EVENTS, EXCERPTS) if (folder / name).is_file()]
    there = {entry.path for entry in client.list_artifacts(run_id)} if told else set()
    if EVENTS in told and EVENTS not in there:
        client.log_artifact(run_id, str(folder / EVENTS))
    if EXCERPTS in told and EXCERPTS not in there:
        rows = json.loads((folder / EXCERPTS).read_bytes())
        columns = {name: [row[name] for row in rows] for name in (rows[0] if rows else ())}
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
