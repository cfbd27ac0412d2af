"""A cluster of two workers, of Dask or Ray, makes what threads make."""

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec

import pytest
from conftest import copy_project

pytestmark = [pytest.mark.scale, pytest.mark.timeout(900)]


def made(root, runner, environment):
    """What a run made, by node, as the digest of its result, and what it said."""
    changed = [f"--set=launch.{setting}" for setting in (f"runner={runner}", "arms_at_once=2")]
    command = [sys.executable, "-m", "rrlhf", "run", "--profile", "tiny", "--until", "ppo", "--json", *changed]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(done.stdout)
    assert set(told["ran"]) == set(told["folders"])
    manifests = {name: root / folder / "artifact.json" for name, folder in told["folders"].items()}
    return {name: json.loads(path.read_bytes())["digest"] for name, path in manifests.items()}, done.stderr


@pytest.fixture(scope="module")
def by_threads(tmp_path_factory):
    return made(copy_project(tmp_path_factory.mktemp("threads") / "project"), "threads", os.environ)[0]


def test_two_workers_of_dask_make_what_threads_make(by_threads, tmp_path):
    pytest.importorskip("prefect_dask", reason="without prefect-dask, of the extra dask: `make test-scale` installs it")
    from distributed import Client, LocalCluster, get_task_stream

    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster, Client(cluster) as client:
        environment = os.environ | {"DASK_SCHEDULER_ADDRESS": cluster.scheduler_address}
        with get_task_stream(client) as stream:
            found, _ = made(copy_project(tmp_path / "project"), "dask", environment)
    assert len({each["worker"] for each in stream.data}) == 2
    assert found == by_threads


def test_two_workers_of_ray_make_what_threads_make(by_threads, tmp_path):
    if find_spec("prefect_ray") is None:
        pytest.skip("without prefect-ray, of the extra ray: `make test-scale` installs it")
    environment = os.environ | {"RAY_USAGE_STATS_ENABLED": "0"}
    found, said = made(copy_project(tmp_path / "project"), "ray", environment)
    assert len(set(re.findall(r"\(have pid=(\d+)\)", said))) == 2
    assert found == by_threads
