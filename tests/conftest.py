"""What several test files share: a copy of the project in a folder of its own."""

import os
import random
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = [".dvc/config", ".dvcignore", "dvc.yaml", "params.yaml", "profiles", "rrlhf", "flows"]


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


@pytest.fixture
def project(tmp_path):
    return copy_project(tmp_path / "project")


@pytest.fixture(scope="module")
def shared_project(tmp_path_factory):
    return copy_project(tmp_path_factory.mktemp("shared") / "project")


@pytest.fixture(scope="session")
def start(tmp_path_factory):
    """A small data set of pairs, without topics, and a random model as the SFT model: folders `data` and `sft`."""
    from rrlhf.config import load_params
    from rrlhf.models import load_base, save_model
    from rrlhf.tables import write_table

    root, draw = tmp_path_factory.mktemp("start"), random.Random(0)
    (root / "data").mkdir()

    def rows(count, name):
        for n in range(count):
            prompt = [{"role": "user", "content": f"Say something {name} {n}."}]
            good, bad = ("".join(draw.choices(letters, k=draw.randint(4, 12))) for letters in ("aeiou ab", "xyzqw xz"))
            yield {"prompt": prompt, "chosen": good, "rejected": bad, "flipped": None}

    for name, count in {"preferences": 48, "heldout": 16, "ppo": 12, "evaluate": 6}.items():
        asked = list(rows(count, name))
        if name in {"ppo", "evaluate"}:
            asked = [{"prompt": row["prompt"], "topic": None} for row in asked]
        write_table(root / "data", name, asked)
    model = load_params(ROOT, "tiny").model.model_copy(update={"base": "random:3x32"})
    save_model(load_base(model), root / "sft")
    return root
