"""A flow that was stopped and killed in mid-training, and run again by the same command."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress

import psutil
import pytest
from mlflow import MlflowClient

UPDATES = 8
RUN = ["run", "--profile", "tiny", "--set", f"ppo.updates={UPDATES}", "--set", "health.checkpoint_every=1"]
RUN += ["--set", "arms={single: null, direct: null, choosy: null}", "--set", "ppo.epochs=4"]

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def start(shared_project):
    """Start the command in a folder, as a person does, with its words in a file."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT", "MLFLOW"))}
    environment |= {"PREFECT_HOME": str(shared_project / ".prefect"), "OMP_NUM_THREADS": "1"}

    def begin(root, told, **more):
        command = [sys.executable, "-m", "rrlhf", *RUN]
        with told.open("w") as words:
            return subprocess.Popen(command, cwd=root, env=environment | more, stdout=words, stderr=words)

    return begin


@pytest.fixture
def prefect_server(tmp_path):
    """Start a Prefect server as people do who share one; its port stays the same."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "prefect",
        "server",
        "start",
        "--no-ui",
        "--host",
        "127.0.0.1",
        "--port",
        f"{port}",
    ]
    servers = []

    def begin():
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        servers.append(subprocess.Popen(command, env=os.environ | {"PREFECT_HOME": str(tmp_path / "home")}, **quiet))
        while servers[-1].poll() is None:
            with suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/api/health", timeout=1).close()
                break
            time.sleep(0.3)
        return servers[-1], f"http://127.0.0.1:{port}/api"

    yield begin
    for server in servers:
        server.kill()
        server.wait()


def wait_for_checkpoint(root, process, told, after):
    """Wait until ppo has saved more than so many rollouts."""
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None:
        saved = [int(path.name[:8]) for path in root.glob("artifacts/.staging/ppo-*/checkpoint/0*")]
        if saved and max(saved) > after:
            return
        time.sleep(0.02)
    raise AssertionError(told.read_text())


def weights(root):
    (artifact,) = root.glob("artifacts/ppo/*/artifact.json")
    return json.loads(artifact.read_text())["files"]["model.safetensors"]


@pytest.mark.slow
def test_a_stopped_and_a_killed_run_end_with_the_bits_and_the_history_of_an_undisturbed_one(
    shared_project, start, tmp_path
):
    root, told = shared_project, tmp_path / "told.txt"
    process = start(root, told)
    wait_for_checkpoint(root, process, told, after=1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 128 + signal.SIGTERM, told.read_text()
    assert "saved after" in told.read_text()
    assert "the same command goes on from there" in told.read_text()
    undisturbed = tmp_path / "undisturbed"
    shutil.copytree(root, undisturbed, ignore=shutil.ignore_patterns(".staging", ".rrlhf", "mlflow.db*", "mlartifacts"))

    process = start(root, told)
    wait_for_checkpoint(root, process, told, after=4)
    process.kill()
    process.wait()

    assert start(root, told).wait() == 0, told.read_text()
    assert start(undisturbed, told).wait() == 0, told.read_text()
    assert weights(root) == weights(undisturbed)

    client = MlflowClient(f"sqlite:///{root}/mlflow.db")
    (experiment,) = [found for found in client.search_experiments() if found.name == "rrlhf"]
    runs = client.search_runs([experiment.experiment_id], "tags.`rrlhf.stage` = 'ppo'")
    assert sorted(run.info.status for run in runs) == ["FINISHED", "KILLED", "KILLED"]
    (finished,) = [run for run in runs if run.info.status == "FINISHED"]
    for metric in ("score", "kl", "policy_loss"):
        points = client.get_metric_history(finished.info.run_id, metric)
        assert sorted(point.step for point in points) == list(range(UPDATES))


@pytest.mark.slow
@pytest.mark.timeout(1200)  # Prefect's client goes on trying to tell its server of every event
@pytest.mark.parametrize("named", [False, True])
def test_a_run_whose_prefect_server_is_killed_makes_everything_and_the_next_has_nothing_to_compute(
    project, start, tmp_path, prefect_server, named
):
    told, where = tmp_path / "told.txt", {}
    if named:
        server, where["PREFECT_API_URL"] = prefect_server()
    process = start(project, told, **where)
    wait_for_checkpoint(project, process, told, after=0)
    if not named:
        (server,) = [child for child in psutil.Process(process.pid).children() if "server" in child.cmdline()]
    server.kill()
    assert process.wait() == 1
    said = told.read_text()
    assert "Prefect's server answers no more" in said
    assert "Traceback" not in said
    assert list(project.glob("artifacts/evaluate/*/artifact.json"))
    if named:
        server.wait()
        prefect_server()
    assert start(project, told, **where).wait() == 0, told.read_text()
    assert " begins" not in told.read_text()
