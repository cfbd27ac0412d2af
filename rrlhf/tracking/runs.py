"""Runs: one for each flow and each stage, written while it computes or afterwards from an artifact's history."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from rrlhf.artifacts import Artifact
from rrlhf.tracking.records import close_finished, commit_tags, has, stage_tags, to_metrics, write_metrics, write_params
from rrlhf.tracking.server import errors, warn

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
            if not _is_alive(int(run.data.tags["rrlhf.pid"])):
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
        close_finished(self._client, run_id, len(rows), round(1000 * ended))
        return self._client.get_run(run_id)


class LiveRun:
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
        self._waiting += to_metrics(row, time.time())
        if time.monotonic() >= self._due:
            self._write()

    def finish(self, status: str) -> None:
        """Write what waits and close the run, if the server answers."""
        if not self._write() or self._run_id is None:
            return
        try:
            if status == "FINISHED":
                close_finished(self._client, self._run_id, self._rows, round(1000 * time.time()))
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


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
