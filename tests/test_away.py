"""A run whose tracking server, a real one, goes away in its middle; and servers that are slow, frozen or refuse."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager

import pytest
from mlflow import MlflowClient

from rrlhf.pipeline.artifacts import Store

RUN = ["run", "--profile", "tiny", "--take-aliases", "--set", "arms={single: null, direct: null, choosy: null}"]

pytestmark = pytest.mark.timeout(600)


class Server:
    """An MLflow server with a database and files of its own, on one port for good."""

    def __init__(self, folder):
        self.folder = folder
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.address = f"http://127.0.0.1:{self.port}"
        self.process = None

    def start(self):
        command = [sys.executable, "-m", "mlflow", "server", "--port", str(self.port), "--workers", "1"]
        command += ["--backend-store-uri", f"sqlite:///{self.folder}/server.db"]
        command += ["--artifacts-destination", str(self.folder / "files")]
        environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        with (self.folder / "log").open("w") as log:
            self.process = subprocess.Popen(
                command, env=environment, stdout=log, stderr=log, cwd=self.folder, start_new_session=True
            )
        for _ in range(600):
            try:
                urllib.request.urlopen(f"{self.address}/health", timeout=1).close()
                return
            except OSError:
                time.sleep(0.2)
        raise AssertionError((self.folder / "log").read_text())

    def kill(self):
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    found = Server(tmp_path_factory.mktemp("server"))
    found.start()
    yield found
    found.kill()


@contextmanager
def begun(root, server, told):
    """Start a run as a person does, and wait for its training to begin."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT", "MLFLOW"))}
    environment["MLFLOW_TRACKING_URI"] = server.address
    with told.open("w") as words:
        process = subprocess.Popen([sys.executable, "-m", "rrlhf", *RUN], cwd=root, env=environment, stderr=words)
    while "ppo-robust  begins" not in told.read_text() and process.poll() is None:
        time.sleep(0.05)
    yield process


def content(server):
    """What the server knows: of every run its name, end, parent and points; of every version its name and aliases."""
    client = MlflowClient(server.address, server.address)
    [experiment] = [found.experiment_id for found in client.search_experiments() if found.name == "rrlhf"]
    runs = client.search_runs([experiment])
    names = {run.info.run_id: run.info.run_name for run in runs}
    points = {
        run.info.run_name: {
            metric: [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, metric)]
            for metric in run.data.metrics
        }
        for run in runs
    }
    ended = sorted(
        (run.info.run_name, run.info.status, names.get(run.data.tags.get("mlflow.parentRunId"))) for run in runs
    )
    versions = sorted((model.name, *sorted(model.aliases)) for model in client.search_registered_models())
    return ended, points, versions


@pytest.mark.slow
def test_a_run_whose_server_goes_away_is_complete_and_told_once_it_is_back(project, server, tmp_path, monkeypatch):
    told = tmp_path / "told.txt"
    with begun(project, server, told) as process:
        server.kill()
    assert process.wait() == 0, told.read_text()
    assert "complete, unsynced" in told.read_text()
    assert "Traceback" not in told.read_text()
    assert (project / "reports" / "tiny.html").is_file()
    server.start()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.address)
    for said in ("tiny · arms", "knows of every run"):
        done = subprocess.run(
            [sys.executable, "-m", "rrlhf", "sync"], cwd=project, capture_output=True, text=True, check=True
        )
        assert said in done.stdout
    ended, points, versions = content(server)
    flow = next(name for name, _, parent in ended if parent is None)
    artifacts = {made.name: made for made in Store(project).all() if made.name != "data"}
    assert ended == sorted([(flow, "FINISHED", None), *((name, "FINISHED", flow) for name in artifacts)])
    for name, artifact in artifacts.items():
        for metric, found in points[name].items():
            assert found == [(row.get("step", 0), row[metric]) for row in artifact.history() if metric in row]
    assert ("rrlhf-tiny-policy", "candidate", "robust") in versions
