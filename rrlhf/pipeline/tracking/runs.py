"""Runs: one for each flow and each stage, written while it computes or afterwards from an artifact's history."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from rrlhf.locks import is_alive
from rrlhf.pipeline.artifacts import Artifact
from rrlhf.pipeline.tracking.records import (
    close_finished,
    commit_tags,
    has,
    stage_tags,
    to_metrics,
    write_metrics,
    write_params,
)
from rrlhf.pipeline.tracking.server import errors, long_requests, warn
from rrlhf.policy.excerpts import FILE as EXCERPTS
from rrlhf.policy.excerpts import Excerpt, read_excerpts
from rrlhf.policy.health import EVENTS, in_words
from rrlhf.types import Metrics

SECONDS_BETWEEN_WRITES = 3.0
SILENCE = 10  # a write that took t seconds is followed by at least 10 t without one: training loses a tenth at most


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
        above = {"mlflow.parentRunId": parent} if parent else {}
        run = self._client.create_run(self._experiment_id, started, {**tags, **above}, name)
        run_id: str = run.info.run_id
        write_params(self._client, run_id, settings)
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
        manifest = artifact.manifest
        ended = datetime.fromisoformat(manifest["created"]).timestamp()
        started = ended - manifest["seconds"]
        tags = stage_tags(artifact.name, artifact.stage, artifact.key) | commit_tags(manifest["git_commit"])
        run_id = self.new(
            artifact.name, tags, manifest["document"]["params"], parent=parent, started=round(1000 * started)
        )
        metrics = [metric for row in rows for metric in to_metrics(row, started + row.get("seconds", 0.0))]
        write_metrics(self._client, run_id, metrics)
        if is_watched(manifest["document"]["params"]):
            write_health(self._client, run_id, rows, "FINISHED")
        close_finished(self._client, run_id, len(rows), round(1000 * ended))
        return self._client.get_run(run_id)


class LiveRun:
    """A run that is written to while its stage computes."""

    def __init__(self, client: Any, run_id: str | None, name: str, watched: bool) -> None:
        self._client, self._run_id, self._name, self._watched = client, run_id, name, watched
        self._waiting: list[Any] = []  # mlflow.entities.Metric
        self._rows: list[Metrics] = []
        self._due = time.monotonic() + SECONDS_BETWEEN_WRITES
        self._warned = run_id is None

    def log(self, row: Metrics) -> None:
        """Take a row, and write all that wait when it is time."""
        self._rows.append(row)
        self._waiting += to_metrics(row, time.time())
        if time.monotonic() >= self._due:
            self._write()

    def finish(self, status: str, folder: Path | None) -> None:
        """Write what waits and what is left in the stage's folder, and close the run, if the server answers."""
        if not self._write() or self._run_id is None:
            return
        try:
            if self._watched:
                write_health(self._client, self._run_id, self._rows, status)
            if folder:
                write_told(self._client, self._run_id, folder)
            if status == "FINISHED":
                close_finished(self._client, self._run_id, len(self._rows), round(1000 * time.time()))
            else:
                self._client.set_terminated(self._run_id, status)
        except errors() as error:
            warn(self._name, error)

    def _write(self) -> bool:
        """Write the waiting numbers; False when the server did not take them. Writing one twice changes nothing."""
        start = time.monotonic()
        done = self._run_id is not None
        try:
            if done:
                write_metrics(self._client, str(self._run_id), self._waiting)
            self._waiting.clear()
        except errors() as error:
            done = False
            if not self._warned:
                warn(self._name, error)
                self._warned = True
        end = time.monotonic()
        self._due = end + max(SECONDS_BETWEEN_WRITES, SILENCE * (end - start))
        return done


def is_watched(settings: Mapping[str, Any]) -> bool:
    """Whether a stage with these settings looks after its training's health."""
    return "health" in settings


def write_health(client: Any, run_id: str, rows: Iterable[Metrics], status: str) -> None:
    """Tag a run with its training's health; one that ended early is not called healthy."""
    told = in_words(rows)
    if status == "FINISHED" or told != "healthy":
        client.set_tag(run_id, "rrlhf.health", told)


def write_told(client: Any, run_id: str, folder: Path) -> None:
    """Have a run hold the events and the texts that its stage left: as a file, and as a table of MLflow's."""
    told = [name for name in (EVENTS, EXCERPTS) if (folder / name).is_file()]
    there = {entry.path for entry in client.list_artifacts(run_id)} if told else set()
    with long_requests():
        if EVENTS in told and EVENTS not in there:
            client.log_artifact(run_id, str(folder / EVENTS))
        if EXCERPTS in told and EXCERPTS not in there:
            _write_table(client, run_id, read_excerpts(folder), EXCERPTS)


def _write_table(client: Any, run_id: str, rows: Sequence[Excerpt], name: str) -> None:
    """Have MLflow's page of a run show rows as a table; its own writer warns with pandas 3."""
    content = {"columns": list(rows[0]) if rows else [], "data": [list(row.values()) for row in rows]}
    client.log_text(run_id, json.dumps(content), name)
    client.set_tag(run_id, "mlflow.loggedArtifacts", json.dumps([{"path": name, "type": "table"}]))
