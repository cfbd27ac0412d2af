"""What several test files share: a copy of the project in a folder of its own."""

import os
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
