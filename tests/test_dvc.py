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
from functools import partial
from pathlib import Path

import pytest
import yaml

from rrlhf.environment import set_environment
from rrlhf.pipeline.artifacts import TamperedError
from rrlhf.pipeline.params import load_params
from rrlhf.pipeline.plan import Project
from rrlhf.pipeline.versioning.datasets import RWLOCK, BusyError, prepare_dataset
from rrlhf.pipeline.versioning.records import run_records
from rrlhf.pipeline.versioning.setup import follow_git, is_under_git
from rrlhf.tools.running.numbers import numbers_digests, write_numbers

ROOT = Path(__file__).parents[1]
ROWS = [{"prompt": f"Say {i}.", "chosen": f"Here you are: {i}.", "rejected": f"No, not {i}."} for i in range(60)]
CLEAN = "Data and pipelines are up to date.\n"


class Repository:
    """A copy of the project under git, whose profile tiny reads rows that no model has to write."""

    def __init__(self, root):
        self.root = root
        (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
        shutil.copy(ROOT / ".gitignore", root)
        shutil.copy(ROOT / ".dvc" / ".gitignore", root / ".dvc")
        self.edit(lambda settings: settings["prepare"].update(source="rows.jsonl", format="rows"))
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

    def edit(self, change):
        """Change the settings of the profile."""
        path = self.root / "profiles" / "tiny.yaml"
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
        change(settings)
        path.write_text(yaml.safe_dump(settings), encoding="utf-8")

    @property
    def project(self):
        return self.with_(None)

    def with_(self, overrides):
        return Project(self.root, "tiny", load_params(self.root, "tiny", overrides))

    def finish(self, gold):
        """Leave what a run leaves whose policy has this gold score."""
        metrics = {"gold": {"mean": gold, "stderr": 0.1, "n": 9}}
        policies = [{"name": "robust", "settings": {}, "reward": "robust", "metrics": metrics}]
        curves = [{"policy": "robust", "update": step, "kl": 0.1, "proxy": gold * step} for step in range(3)]
        evaluation = {"policies": policies, "curves": curves, "samples": [], "reward_models": []}
        write_numbers(self.project, evaluation, {})


@pytest.fixture(scope="module")
def made(shared_project):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(shared_project)
        patch.setenv("PATH", os.environ["PATH"])  # restored afterwards: set_environment changes it
        set_environment(shared_project)
        repository = Repository(shared_project)
        repository.dvc("repro", "--quiet", "prepare@tiny")
        repository.finish(gold=1.0)
        repository.commit("first")
        yield repository


@pytest.fixture(autouse=True)
def _nothing_stays(made):
    yield
    made("git", "reset", "--hard", "--quiet")


def test_what_a_run_leaves_is_clean_and_git_is_asked_to_keep_what_matters(made):
    assert made.dvc("status", "prepare@tiny") == CLEAN
    kept = made("git", "ls-files", "dvc.lock", "data", "reports", ".dvc/config.local").split()
    assert kept == ["dvc.lock", "reports/tiny/curves.csv", "reports/tiny/metrics.json"]
    assert made("git", "status", "--porcelain") == ""


@pytest.mark.parametrize(
    ("change", "again"), [({"ppo": {"kl_weight": 0.7}}, []), ({"prepare": {"limit": 50}}, ["prepare@tiny"])]
)
def test_repro_makes_data_anew_where_rrlhf_says_that_they_changed(made, change, again):
    made.edit(lambda settings: [settings[section].update(setting) for section, setting in change.items()])
    ran = re.findall("Running stage '(.*)'", made.dvc("repro", "prepare@tiny"))
    assert ran == ["key@tiny", *again]
    assert made.project.plan()[0].action == "reuse"
    made("git", "reset", "--hard", "--quiet")
    made.dvc("repro", "--quiet", "prepare@tiny")  # brings the first version back
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
    assert numbers_digests(other) == {}
    assert made("git", "status", "--porcelain") == ""


def test_a_missing_number_is_noticed(made):
    assert numbers_digests(made.project)
    (made.root / "reports" / "tiny" / "metrics.json").unlink()
    assert numbers_digests(made.project) is None


@pytest.mark.slow
@pytest.mark.parametrize("run_cache", [["--run-cache"], []])
def test_pushed_data_come_back_and_are_not_made_again(made, tmp_path, run_cache):
    dataset = made.project.dataset()
    made.dvc("remote", "add", "--local", "--force", "--default", "store", str(tmp_path))
    made.dvc("push", "--quiet", *run_cache)
    shutil.rmtree(made.root / "data")
    shutil.rmtree(made.root / ".dvc" / "cache")
    made.dvc("pull", "--quiet", "--allow-missing", *run_cache)
    assert made.project.dataset() == dataset
    assert made.project.plan()[0].action == "reuse"
    assert re.findall("Running stage '(.*)'", made.dvc("repro", "prepare@tiny")) == ["key@tiny"]
    assert made.dvc("status", "prepare@tiny") == CLEAN
    assert len(run_records(made.root)) == len(run_cache)


def test_a_changed_lock_is_told_and_one_from_another_machine_is_taken(made):
    if not run_records(made.root):
        made.dvc("commit", "--quiet", "--force", "prepare@tiny")
    path = made.root / "dvc.lock"
    locked = yaml.safe_load(path.read_text(encoding="utf-8"))
    entry = locked["stages"]["prepare@tiny"]
    entry["outs"][0]["md5"] = "0" * 32 + ".dir"
    path.write_text(yaml.safe_dump(locked), encoding="utf-8")
    with pytest.raises(TamperedError, match=r"dvc\.lock was changed"):
        made.project.dataset()
    entry["deps"][0]["md5"] = "0" * 32  # settings that nobody had here
    path.write_text(yaml.safe_dump(locked), encoding="utf-8")
    assert made.project.dataset() is None


def test_a_copy_without_git_works_and_one_under_git_compares_commits(made, tmp_path):
    assert is_under_git(made.root)
    copy = tmp_path / "copy"
    shutil.copytree(made.root, copy, ignore=shutil.ignore_patterns(".git", "artifacts", "tmp"))
    assert not is_under_git(copy)
    follow_git(copy)
    assert "no_scm" not in (copy / ".dvc" / "config.local").read_text(encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "dvc", "status", "prepare@tiny"], cwd=copy, capture_output=True, text=True, check=True
    )
    assert done.stdout == CLEAN


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
    declared = [*here["key"]["foreach"], *large["key"]["foreach"]]
    assert sorted(declared) == sorted(["default", *(path.stem for path in (ROOT / "profiles").glob("*.yaml"))])


HOLDER = """
import sys; from dvc.repo import Repo
repo = Repo(config={'core': {'no_scm': True}})
with repo.lock: print('held', flush=True); sys.stdin.read()
"""
SLEEPER = "import sys; print('held', flush=True); sys.stdin.read()"


@contextmanager
def running(program, root):
    with subprocess.Popen([sys.executable, "-c", program], cwd=root, stdin=-1, stdout=-1) as process:
        assert process.stdout.readline() == b"held\n"
        yield process.pid
        process.stdin.close()


def other_data(made):
    """Asks for a data set that is not there."""
    project = made.with_({"seed": 77})
    document = project.document(project.nodes[0], {})
    return partial(prepare_dataset, made.root, project.place(document), document)


def test_a_data_set_waits_for_another_command_and_is_made_once_that_ends(made, capfd):
    with ThreadPoolExecutor() as pool:
        with running(HOLDER, made.root) as process:
            waiting = pool.submit(other_data(made))
            said = ""
            while "waiting up to 60 s" not in said and not waiting.done():
                time.sleep(0.1)
                said += capfd.readouterr().err
        assert f"process {process} (" in said
        assert waiting.result(300).digest.startswith("md5:")


@pytest.mark.parametrize("lock", ["of the project", "of files"])
def test_a_command_that_goes_on_holding_the_lock_is_named(made, monkeypatch, lock):
    monkeypatch.setattr("rrlhf.pipeline.versioning.datasets.SECONDS_TO_LOCK", 0.0)
    ask = other_data(made)
    with running(HOLDER if lock == "of the project" else SLEEPER, made.root) as process:
        if lock == "of files":
            taken = {"write": {str(made.root / "data"): {"pid": process, "cmd": "dvc repro of a friend"}}}
            (made.root / RWLOCK).write_text(json.dumps(taken))
        with pytest.raises(BusyError, match=rf"gave up after 0 s: .*process {process} \("):
            ask()


@pytest.mark.parametrize("content", [b"", b'{"write": {"/a"', b"[]", b"\xff\xfe"])
def test_a_half_written_lock_is_named_with_the_way_to_mend_it(made, content):
    path = made.root / RWLOCK
    path.write_bytes(content)
    with pytest.raises(BusyError, match=f"rm {re.escape(str(path))}$"):
        other_data(made)()
    path.unlink()
