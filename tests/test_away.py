"""A run whose tracking server, a real one, goes away in its middle; and servers that are slow, frozen or refuse."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager

import pytest
from finished import at_work
from interrupting import handing_on
from mlflow import MlflowClient

from rrlhf.execution.closing import register_all
from rrlhf.execution.nodes import Started, have, take
from rrlhf.execution.pages import Pages
from rrlhf.execution.state import Run, tracked
from rrlhf.pipeline.decide import Part, chosen
from rrlhf.pipeline.plan import Project
from rrlhf.pipeline.store import Store
from rrlhf.pipeline.tracking.tracker import Tracker
from rrlhf.pipeline.tracking.unsynced import sync

RUN = ["run", "--profile", "tiny", "--take-aliases", "--set", "arms={single: null, direct: null, choosy: null}"]

pytestmark = pytest.mark.timeout(600)


class Server:
    """An MLflow server on one port for good; its database and its files are in a folder."""

    def __init__(self, folder):
        self.folder = folder
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.address = f"http://127.0.0.1:{self.port}"
        self.process = None

    def start(self):
        command = [sys.executable, "-m", "mlflow", "server", "--port", str(self.port), "--workers", "1"]
        command += ["--backend-store-uri", f"sqlite:///{self.folder}/mlflow.db"]
        command += ["--default-artifact-root", (self.folder / "mlartifacts").as_uri()]
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

    def freeze(self):
        os.killpg(self.process.pid, signal.SIGSTOP)

    def thaw(self):
        os.killpg(self.process.pid, signal.SIGCONT)


@pytest.fixture
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


def content(address):
    """What a server knows: of every run its name, end, parent and points; of every version its name and aliases."""
    client = MlflowClient(address, address)
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


def test_a_run_whose_server_is_killed_is_complete_and_told_to_the_next(project, database, monkeypatch, capfd):
    shutil.copy(database, project)
    monkeypatch.setattr("rrlhf.pipeline.tracking.runs.SECONDS_BETWEEN_WRITES", 0.1)
    Tracker(project, "rrlhf")  # the database stays when its server is gone
    server = Server(project)
    server.start()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.address)

    def kill(row):
        if row["step"] == 2:
            while len(content(server.address)[1].get("sft", {}).get("loss", [])) < 1:
                time.sleep(0.05)
            server.kill()

    with at_work(project):
        opened = Project.opened(project, "tiny")
        run = Run(opened, chosen(Part(), opened.nodes), [], Pages("tiny"), "tiny")
        with tracked(run):
            for node, log in zip(opened.nodes, (lambda row: None, kill), strict=False):  # data and sft
                planned = opened.decide(node, run.digests, run.wanted)
                with handing_on(log):
                    have.fn(node, planned, run, 0)
                take(Started(node, planned, run, None), run)
            register_all(run)
        assert "complete, unsynced" in capfd.readouterr().err
        monkeypatch.delenv("MLFLOW_TRACKING_URI")
        assert [*sync(project)] == ["tiny: 1 results registered"]
    ended, points, versions = content(f"sqlite:///{project}/mlflow.db")
    assert ended == [("sft", "FINISHED", "tiny"), ("tiny", "FINISHED", None)]
    assert [step for step, _ in points["sft"]["loss"]] == [row["step"] for row in run.artifacts["sft"].history()[1:]]
    assert versions == [("rrlhf-tiny-sft",)]


@pytest.mark.slow
@pytest.mark.parametrize(("goes", "comes"), [(Server.kill, Server.start), (Server.freeze, Server.thaw)])
def test_a_run_whose_server_goes_away_is_complete_and_told_once_it_is_back(
    project, server, tmp_path, monkeypatch, goes, comes
):
    told = tmp_path / "told.txt"
    with begun(project, server, told) as process:
        goes(server)
    assert process.wait() == 0, told.read_text()
    assert "complete, unsynced" in told.read_text()
    assert "Traceback" not in told.read_text()
    assert (project / "reports" / "tiny.html").is_file()
    comes(server)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.address)
    for said in ("tiny · arms", "knows of every run"):
        done = subprocess.run(
            [sys.executable, "-m", "rrlhf", "sync"], cwd=project, capture_output=True, text=True, check=True
        )
        assert said in done.stdout
    ended, points, versions = content(server.address)
    flow = next(name for name, _, parent in ended if parent is None)
    artifacts = {made.name: made for made in Store(project).all() if made.name != "data"}
    assert ended == sorted([(flow, "FINISHED", None), *((name, "FINISHED", flow) for name in artifacts)])
    for name, artifact in artifacts.items():
        for metric, found in points[name].items():
            assert found == [(row.get("step", 0), row[metric]) for row in artifact.history() if metric in row]
    assert ("rrlhf-tiny-policy", "candidate", "robust") in versions
