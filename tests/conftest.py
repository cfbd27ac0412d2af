"""What several test files share: a copy of the project in a folder of its own."""

import os
import random
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from importlib.util import find_spec
from pathlib import Path

import hypothesis
import pytest

from rrlhf.environment import spare_collector

hypothesis.settings.register_profile("any machine", deadline=None)  # how long an example takes says nothing
hypothesis.settings.load_profile("any machine")
spare_collector()
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch reads it: workers and what they start share the cores

ROOT = Path(__file__).parents[1]
PROJECT = [".dvc/config", ".dvc/plots", ".dvcignore", "dvc.yaml", "large", "params.yaml", "profiles", "rrlhf", "flows"]

TINY = {  # shape of the random models of every make
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}

LONGEST = [
    "test_pipeline",
    "test_deployment",
    "test_interrupted",
    "test_tracking",
    "test_audit",
    "test_products",
    "test_makes",
    "test_ppo",
    "test_steps",
    "test_resume",
    "test_kinds",
]


def pytest_collection_modifyitems(items):
    """Begin with the files that take longest, so that workers end at about the same time."""
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


@pytest.fixture(scope="session", autouse=True)
def _no_servers_of_the_user():
    for name in ("PREFECT_API_URL", "PREFECT_HOME", "MLFLOW_TRACKING_URI"):
        os.environ.pop(name, None)


def copy_project(to: Path) -> Path:
    """Copy the sources without git, results or caches: the project works anywhere."""
    for name in PROJECT:
        source, target = ROOT / name, to / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target)
    return to


# In one thread: with several, two writes under If-None-Match may both find nothing there, as they may not on S3.
S3_SERVER = """
import sys
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import run_simple
run_simple("127.0.0.1", int(sys.argv[1]), DomainDispatcherApplication(create_backend_app))
"""


@pytest.fixture(scope="session")
def s3():
    """A server on loopback that speaks S3 and has a bucket `rrlhf`: the environment in which clients find it."""
    if missing := [name for name in ("moto", "s3fs") if find_spec(name) is None]:
        pytest.skip(f"without {' and '.join(missing)}, of the extra scale: `make test-scale` installs it")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    quiet = subprocess.DEVNULL
    server = subprocess.Popen([sys.executable, "-c", S3_SERVER, str(port)], stdout=quiet, stderr=quiet)
    address, give_up = f"http://127.0.0.1:{port}", time.monotonic() + 120
    while True:
        try:
            urllib.request.urlopen(urllib.request.Request(f"{address}/rrlhf", method="PUT"), timeout=10).close()
            break
        except OSError:
            assert server.poll() is None, "the S3 server ended"
            assert time.monotonic() < give_up, "the S3 server does not answer"
            time.sleep(0.3)
    known = {"AWS_ACCESS_KEY_ID": "tests", "AWS_SECRET_ACCESS_KEY": "tests-secret", "AWS_DEFAULT_REGION": "us-east-1"}
    yield {"AWS_ENDPOINT_URL": address, **known}
    server.terminate()
    server.wait(60)


@pytest.fixture
def typed(monkeypatch, capsys):
    """The command in this process, as typed: returns its exit code and what it said on stdout and stderr."""
    from rrlhf.cli import main

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["rrlhf", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr()
        return ended.value.code or 0, said.out, said.err

    return call


@pytest.fixture
def project(tmp_path):
    return copy_project(tmp_path / "project")


@pytest.fixture(scope="module")
def shared_project(tmp_path_factory):
    return copy_project(tmp_path_factory.mktemp("shared") / "project")


@pytest.fixture(scope="session")
def database(tmp_path_factory):
    """Return one database with MLflow's tables, to be copied; making them takes seconds."""
    from mlflow import MlflowClient

    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    MlflowClient(tracking_uri=f"sqlite:///{path}")
    return path


@pytest.fixture(scope="session")
def start(tmp_path_factory):
    """A small data set without topics, and a random model as the SFT model: folders `data` and `sft`."""
    from rrlhf.data.tables import write_tables
    from rrlhf.models.load import load_base, save_model
    from rrlhf.pipeline.params import load_params

    root, draw = tmp_path_factory.mktemp("start"), random.Random(0)
    (root / "data").mkdir()

    def rows(count, name):
        for n in range(count):
            prompt = [{"role": "user", "content": f"Say something {name} {n}."}]
            good, bad = ("".join(draw.choices(letters, k=draw.randint(4, 12))) for letters in ("aeiou ab", "xyzqw xz"))
            yield {"prompt": prompt, "chosen": good, "rejected": bad, "flipped": None}

    for name, count in {"preferences": 40, "heldout": 16, "ppo": 11, "evaluate": 4}.items():
        asked = list(rows(count, name))
        if name in {"ppo", "evaluate"}:
            asked = [{"prompt": row["prompt"], "topic": None} for row in asked]
        write_tables(root / "data", ((name, each) for each in asked))
    said = [{"prompt": row["prompt"], "response": row["chosen"]} for row in rows(20, "sft")]
    write_tables(root / "data", (("sft", each) for each in said))
    model = load_params(ROOT, "tiny").model.model_copy(update={"base": "random:3x32"})
    save_model(load_base(model), root / "sft")
    return root


@pytest.fixture(scope="session")
def model():
    """Settings of a random model of three layers."""
    from rrlhf.config import Model

    return Model(
        base="random:3x32",
        revision=None,
        device="cpu",
        dtype="float32",
        save_dtype="auto",
        date="2025-01-01",
        system_prompt=None,
        prompt_tokens=64,
        response_tokens=6,
    )


@pytest.fixture
def ppo():
    """Settings of a short training."""
    from rrlhf.config import Ppo

    return Ppo(
        updates=3,
        prompts_per_update=8,
        responses_per_prompt=1,
        minibatch_size=4,
        microbatch_tokens=4096,
        epochs=2,
        trains="layers",
        train_layers=2,
        lora_rank=4,
        lora_targets=None,
        learning_rate=1e-3,
        kl_weight=0.05,
        kl_estimator="k1",
        kl_in="reward",
        kl_target=None,
        kl_horizon=80,
        max_kl=None,
        estimator="gae",
        gae_lambda=0.95,
        clip_ratio=0.2,
        clip_value=0.2,
        value_weight=0.1,
        max_grad_norm=1.0,
        missing_eos_score=-1.0,
        max_step_kl=10.0,
    )


@pytest.fixture
def rewards(tmp_path):
    """A folder with a single head and one with five, both with random weights."""
    return save_random_heads(tmp_path / "reward", 1), save_random_heads(tmp_path / "ensemble", 5)


def prompts(folder, name):
    """The prompts of table `ppo` or `evaluate` of a data set."""
    from rrlhf.data.tables import read_table

    return [row["prompt"] for row in read_table(folder, name)]


def save_random_heads(folder, heads):
    """Make the folder of a reward model that reads the first layer of a model of width 32."""
    import torch

    from rrlhf.rewards.features import PairFeatures
    from rrlhf.rewards.heads import Pairs, RewardHeads
    from rrlhf.rewards.trunk import FILE

    folder.mkdir(exist_ok=True)
    torch.manual_seed(heads)
    RewardHeads(32, heads, 0, 0.05).save(folder)
    train, heldout = (Pairs(torch.randn(4, 32), torch.randn(4, 32)) for _ in range(2))
    PairFeatures(train, heldout, torch.arange(4)).save(folder)
    (folder / FILE).write_text('{"layer": 1}')
    return folder
