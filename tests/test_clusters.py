"""A Dask cluster of two workers makes what threads make."""

import json
import os
import subprocess
import sys

import pytest
from conftest import copy_project

pytestmark = [pytest.mark.scale, pytest.mark.timeout(900)]


def made(root, runner, environment):
    """What a run made, by node: the digest of its result."""
    changed = [f"--set=launch.{setting}" for setting in (f"runner={runner}", "arms_at_once=2")]
    command = [sys.executable, "-m", "rrlhf", "run", "--profile", "tiny", "--until", "ppo", "--json", *changed]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(done.stdout)
    assert set(told["ran"]) == set(told["folders"])
    manifests = {name: root / folder / "artifact.json" for name, folder in told["folders"].items()}
    return {name: json.loads(path.read_bytes())["digest"] for name, path in manifests.items()}


def test_a_cluster_makes_what_threads_make_and_both_of_its_workers_do(tmp_path):
    reason = "without prefect-dask, of the extra dask: `make test-scale` installs it"
    pytest.importorskip("prefect_dask", reason=reason)
    from distributed import Client, LocalCluster, get_task_stream

    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster, Client(cluster) as client:
        environment = os.environ | {"DASK_SCHEDULER_ADDRESS": cluster.scheduler_address}
        with get_task_stream(client) as stream:
            found = made(copy_project(tmp_path / "dask"), "dask", environment)
    assert len({each["worker"] for each in stream.data}) == 2
    assert found == made(copy_project(tmp_path / "threads"), "threads", os.environ)
