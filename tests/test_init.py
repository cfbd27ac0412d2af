"""rrlhf as somebody has it who installs it: the wheel, and the project that `rrlhf init` makes of what it carries."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SMALL = ["--set", "prepare.limit=60", "--set", "ppo.updates=1", "--set", "arms={single: {reward: single}}"]


def test_a_project_has_the_repositorys_own_files_and_a_plan(tmp_path, typed, monkeypatch):
    monkeypatch.setenv("PATH", os.environ["PATH"])
    monkeypatch.chdir(tmp_path)
    code, told, _ = typed("init", "my project")
    made = tmp_path / "my project"
    assert code == 0
    assert "cd 'my project'" in told
    files = {path.relative_to(made) for path in made.rglob("*") if path.is_file() and ".git" not in path.parts}
    assert f"made {len(files)} files" in told
    assert all((made / name).read_bytes() == (ROOT / name).read_bytes() for name in files)
    for folder, kind in {"profiles": "*.yaml", "experiments": "*.yaml", "flows": "*.py", ".": "*.yaml"}.items():
        assert {path.relative_to(ROOT) for path in (ROOT / folder).glob(kind)} <= files
    assert (made / ".git").is_dir()
    monkeypatch.chdir(made)
    code, told, _ = typed("plan", "--profile", "tiny", "--json")
    assert code == 0
    assert json.loads(told)[0]["node"] == "data"


def test_nothing_is_overwritten(tmp_path, typed, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".gitignore").write_text("mine")
    code, _, told = typed("init")
    assert code == 2
    assert told == f"{tmp_path}: nothing was made, for it has .gitignore already\n"
    assert [path.name for path in tmp_path.iterdir()] == [".gitignore"]


def test_outside_a_project_the_way_to_one_is_told_and_the_version(tmp_path, typed, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, told = typed("plan")
    assert code == 2
    assert "`rrlhf init` makes one" in told
    code, told, _ = typed("--version")
    assert code == 0
    assert told.startswith("rrlhf 0.")
    assert [*tmp_path.iterdir()] == []


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_installed_wheel_makes_a_project_in_which_everything_runs(tmp_path):
    sources, site, empty = tmp_path / "sources", tmp_path / "site", tmp_path / "empty"
    shutil.copytree(
        ROOT, sources, ignore=shutil.ignore_patterns(".git", ".venv", "build", "artifacts", ".rrlhf", "tmp")
    )
    pip = [sys.executable, "-m", "pip", "--quiet"]
    alone = ["--no-deps", "--no-index", "--no-build-isolation"]
    subprocess.run([*pip, "wheel", *alone, "--wheel-dir", tmp_path, sources], check=True)
    [wheel] = tmp_path.glob("*.whl")
    assert {name.partition("/")[0].partition("-")[0] for name in zipfile.ZipFile(wheel).namelist()} == {"rrlhf"}
    subprocess.run([*pip, "install", *alone, "--target", site, wheel], check=True)
    empty.mkdir()

    def typed(*arguments):
        environment = os.environ | {"PYTHONPATH": str(site)}
        command = [sys.executable, site / "bin" / "rrlhf", *arguments]
        done = subprocess.run(command, cwd=empty, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    typed("init")
    assert not [*empty.rglob("*.pyc")]
    flow = empty / "flows" / "pipeline.py"
    flow.write_text(
        flow.read_text().replace("    with running(", '    print("the flow of this project")\n    with running(')
    )
    assert {one["action"] for one in json.loads(typed("plan", "--profile", "tiny", *SMALL, "--json"))} == {
        "run",
        "upstream",
    }
    assert "the flow of this project" in typed("run", "--profile", "tiny", *SMALL)
    assert {one["action"] for one in json.loads(typed("plan", "--profile", "tiny", *SMALL, "--json"))} == {"reuse"}
    assert subprocess.run(["git", "status", "--short"], cwd=empty, capture_output=True, text=True).stdout
