"""DVC as a person uses it in a project under git: status, repro, diffs, push and pull, by command."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

from rrlhf.environment import set_environment
from rrlhf.judging.content import Measured
from rrlhf.judging.evaluation import Evaluation, Point, Policy
from rrlhf.pipeline.dvc import RWLOCK, BusyError, bring_back, follow_git, is_under_git, keep, pointer
from rrlhf.pipeline.keys import key_digest
from rrlhf.pipeline.launch import execute
from rrlhf.pipeline.plan import Project
from rrlhf.tools.running.uptodate import numbers_files, write_numbers

ROOT = Path(__file__).parents[2]
ROWS = [{"prompt": f"Say {i}.", "chosen": f"Here you are: {i}.", "rejected": f"No, not {i}."} for i in range(60)]
CLEAN = "Data and pipelines are up to date.\n"


class Repository:
    """A copy of the project under git, whose profile tiny reads rows that no model has to write."""

    def __init__(self, root):
        self.root = root
        (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
        shutil.copy(ROOT / ".gitignore", root)
        shutil.copy(ROOT / ".dvc" / ".gitignore", root / ".dvc")
        path = root / "profiles" / "tiny.yaml"
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
        settings["prepare"].update(source="rows.jsonl", format="rows")
        path.write_text(yaml.safe_dump(settings), encoding="utf-8")
        self("git", "init", "--quiet")
        self.commit("settings")
        follow_git(root)

    def __call__(self, *command, code=0):
        identity = {f"GIT_{who}_{what}": "a@b.c" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
        environment = os.environ | identity | {"DVC_NO_ANALYTICS": "1"}
        done = subprocess.run(command, cwd=self.root, env=environment, capture_output=True, text=True)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr if code else done.stdout

    def dvc(self, *arguments, code=0):
        return self(sys.executable, "-m", "dvc", *arguments, code=code)

    def commit(self, subject):
        self("git", "add", "--all")
        self("git", "commit", "--quiet", "--message", subject)

    @property
    def project(self):
        return self.with_({})

    def with_(self, overrides):
        return Project.opened(self.root, "tiny", overrides)

    def make_data(self):
        """Make the data set, without having DVC version it."""
        project = self.project
        document = project.document(project.nodes[0], {})
        staged = project.store.staging("prepare", key_digest(document))
        execute(document, inputs={}, out=staged, launch=project.params.launch)
        return project.store.publish("data", document, staged, seconds=1.0, profile="tiny")

    def finish(self, gold):
        """Leave what a run leaves whose policy has this gold score."""
        robust = Policy("robust", "robust", {}, {"gold": Measured(gold, 0.1, 9)})
        curves = [Point("robust", step, kl=0.1, proxy=gold * step, words=9.0, heads=[]) for step in range(3)]
        evaluation = Evaluation([robust], curves, samples=[], reward_models=[])
        write_numbers(self.project, evaluation, {})


@pytest.fixture(scope="module")
def made(shared_project):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(shared_project)
        patch.setenv("PATH", os.environ["PATH"])  # restored afterwards: set_environment changes it
        set_environment(shared_project)
        repository = Repository(shared_project)
        repository.data = repository.make_data()
        keep(shared_project, repository.data.path)
        repository.finish(gold=1.0)
        repository.commit("first")
        yield repository


@pytest.fixture(autouse=True)
def _nothing_stays(made):
    yield
    made("git", "reset", "--hard", "--quiet")


def test_what_a_run_leaves_is_clean_and_git_is_asked_to_keep_what_matters(made):
    pointer_ = pointer(made.data.path).relative_to(made.root).as_posix()
    assert made.dvc("status", pointer_) == CLEAN
    kept = made("git", "ls-files", "artifacts", "reports", ".dvc/config.local").split()
    assert kept == [pointer_, "reports/tiny/curves.csv", "reports/tiny/metrics.json"]
    assert made("git", "status", "--porcelain") == ""


@pytest.mark.slow
def test_numbers_of_two_commits_differ_by_arm(made):
    made.finish(gold=1.25)
    found = json.loads(made.dvc("metrics", "diff", "--json"))["reports/tiny/metrics.json"]
    assert found["policies.robust.gold"] == {"old": 1.0, "new": 1.25, "diff": 0.25}
    assert {"policies.robust.gold_low", "policies.robust.gold_high"} <= found.keys()
    page = made.dvc("plots", "diff", "--out", "plots").strip().splitlines()[-1]
    html = Path(page.removeprefix("file://")).read_text(encoding="utf-8")
    shutil.rmtree(made.root / "plots")
    assert "curves.csv" in html
    assert {"HEAD", "workspace"} <= {word.strip('",}]') for word in html.split()}
    assert '"fold"' in html  # our own picture of it


def test_overrides_leave_the_numbers_alone(made):
    other = made.with_({"ppo.kl_weight": 0.7})
    write_numbers(other, {"policies": [], "curves": [], "samples": [], "reward_models": []}, {})
    assert numbers_files(other) == {}
    assert made("git", "status", "--porcelain") == ""


def test_pushed_data_come_back_and_are_not_made_again(made, tmp_path):
    made.dvc("remote", "add", "--local", "--force", "--default", "store", str(tmp_path))
    (made.root / ".dvc" / "cache").rename(made.root / "cache")
    away = made.data.path.rename(made.root / "away")
    assert made.project.plan()[0].action == "run"  # the remote is still empty
    (made.root / "cache").rename(made.root / ".dvc" / "cache")
    away.rename(made.data.path)
    made.dvc("push", "--quiet")
    shutil.rmtree(made.root / ".dvc" / "cache")
    shutil.rmtree(made.data.path)
    assert made.project.plan()[0].action == "restore"
    assert bring_back(made.project.store, "prepare", made.data.key) == made.data  # by a run, from the remote
    shutil.rmtree(made.data.path)
    made.dvc("pull", "--quiet")  # or by hand
    assert made.project.plan()[0].action == "reuse"
    assert made.dvc("status", pointer(made.data.path).relative_to(made.root).as_posix()) == CLEAN


def test_a_copy_without_git_works_and_one_under_git_compares_commits(made, tmp_path):
    assert is_under_git(made.root)
    copy = tmp_path / "copy"
    shutil.copytree(made.root, copy, ignore=shutil.ignore_patterns(".git", "tmp"))
    assert not is_under_git(copy)
    follow_git(copy)
    assert "no_scm" not in (copy / ".dvc" / "config.local").read_text(encoding="utf-8")
    command = [sys.executable, "-m", "dvc", "status", str(pointer(made.data.path).relative_to(made.root))]
    assert subprocess.run(command, cwd=copy, capture_output=True, text=True, check=True).stdout == CLEAN


@pytest.mark.parametrize("before", ["", "[core]\n    remote = store\n['remote \"store\"']\n    url = /store\n"])
def test_the_setting_comes_and_goes_with_git_and_leaves_the_users_alone(tmp_path, before):
    path = tmp_path / ".dvc" / "config.local"
    path.parent.mkdir()
    path.write_text(before, encoding="utf-8")
    path.chmod(0o600)
    follow_git(tmp_path)
    assert path.read_text(encoding="utf-8") == before
    (tmp_path / ".git").mkdir()
    follow_git(tmp_path)
    assert path.read_text(encoding="utf-8").count("no_scm = false") == 1
    assert path.stat().st_mode & 0o777 == 0o600
    (tmp_path / ".git").rmdir()
    follow_git(tmp_path)
    assert path.read_text(encoding="utf-8") == (before or "[core]\n")
    path.write_text("[core]\n    no_scm = true\n", encoding="utf-8")
    (tmp_path / ".git").mkdir()
    follow_git(tmp_path)
    assert "false" not in path.read_text(encoding="utf-8")


def test_both_files_declare_the_same_stages():
    here, large = (yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))["stages"] for name in
                   ("dvc.yaml", "large/dvc.yaml"))  # fmt: skip
    assert {stage: entry["do"] | {"wdir": ".."} for stage, entry in here.items()} == {
        stage: entry["do"] for stage, entry in large.items()
    }
    declared = [*here["prepare"]["foreach"], *large["prepare"]["foreach"]]
    assert sorted(declared) == sorted(["default", *(path.stem for path in (ROOT / "profiles").glob("*.yaml"))])


HOLDER = """
import sys; from dvc.repo import Repo
repo = Repo(config={'core': {'no_scm': True}})
with repo.lock: print('held', flush=True); sys.stdin.read()
"""


@contextmanager
def running(program, root):
    with subprocess.Popen([sys.executable, "-c", program], cwd=root, stdin=-1, stdout=-1) as process:
        assert process.stdout.readline() == b"held\n"
        yield
        process.stdin.close()


def test_a_data_set_waits_for_another_command_and_is_versioned_once_that_ends(made, capfd):
    with ThreadPoolExecutor() as pool:
        with running(HOLDER, made.root):
            waiting = pool.submit(keep, made.root, made.data.path)
            said = ""
            while "waiting up to 60 s" not in said and not waiting.done():
                time.sleep(0.1)
                said += capfd.readouterr().err
        waiting.result(300)


def test_a_command_that_goes_on_holding_the_lock_ends_the_waiting(made, monkeypatch):
    monkeypatch.setattr("rrlhf.pipeline.dvc.SECONDS_TO_LOCK", 0.0)
    with running(HOLDER, made.root), pytest.raises(BusyError, match="another DVC process is running"):
        keep(made.root, made.data.path)


@pytest.mark.parametrize("content", [b'{"write": {"/a"', b"\xff\xfe"])
def test_a_half_written_lock_is_named_with_the_way_to_mend_it(made, content):
    path = made.root / RWLOCK
    path.write_bytes(content)
    with pytest.raises(BusyError, match=f"rm {re.escape(str(path))}$"):
        keep(made.root, made.data.path)
    path.unlink()
