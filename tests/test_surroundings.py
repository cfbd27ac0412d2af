"""What a machine may lack: a home, a terminal, git, room for temporary files, Linux; and how its folders are called."""

import errno
import gc
import os
import signal
import subprocess
import sys
import tempfile
import weakref
from pathlib import Path

import pytest
from conftest import copy_project

from rrlhf import hardware
from rrlhf.environment import end_with_parent, give_back_memory, releasing_memory
from rrlhf.pipeline.artifacts import git_commit

ROOT = Path(__file__).parents[1]


@pytest.fixture
def plan(project, monkeypatch, typed):
    monkeypatch.chdir(project)
    monkeypatch.setenv("PATH", os.environ["PATH"])  # put back afterwards: commands change it
    return lambda: typed("plan", "--profile", "tiny")


def told(answer):
    code, out, err = answer
    assert (code, "never made here" in out) == (0, True), err
    return out


def test_a_home_folder_is_not_needed(plan, monkeypatch):
    for name in ("HOME", "XDG_CACHE_HOME", "USER", "LOGNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda number: {}[number])
    told(plan())


def test_without_git_a_result_has_no_commit_and_all_else_goes_on(plan, project, monkeypatch):
    monkeypatch.setenv("PATH", str(project / "nothing"))
    told(plan())
    assert git_commit(project) is None


def test_a_machine_without_a_place_for_temporary_files_is_told_in_words(project, monkeypatch, typed):
    monkeypatch.chdir(project)
    monkeypatch.setenv("TMPDIR", str(project / "gone"))
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(
        tempfile,
        "_get_default_tempdir",
        lambda: (_ for _ in ()).throw(
            FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']")
        ),
    )
    code, out, err = typed("doctor", "--profile", "tiny")
    assert code == 1
    assert "No usable temporary directory" in out + err
    assert "set TMPDIR" in out


@pytest.mark.parametrize("name", ["Größe, ein Maß", "a 'b' \"c\" $d ;e", "-x", "名前", "%41#?&"])
def test_a_project_s_folder_may_have_any_name_and_be_a_link(tmp_path, monkeypatch, typed, name):
    copy_project(tmp_path / name)
    (tmp_path / "link").symlink_to(tmp_path / name)
    monkeypatch.setenv("PATH", os.environ["PATH"])
    monkeypatch.chdir(tmp_path / name)
    straight = told(typed("plan", "--profile", "tiny"))
    monkeypatch.chdir(tmp_path / "link" / "profiles")
    assert told(typed("plan", "--profile", "tiny")) == straight


def test_a_machine_that_is_not_linux_has_processors_and_a_record(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity")
    assert hardware.cores() == os.cpu_count()
    assert hardware.describe()["cores"] == os.cpu_count()
    monkeypatch.setattr(hardware, "Path", lambda path: Path("/nowhere") / str(path).strip("/"))  # no /proc
    assert not hardware._has_bf16_units.__wrapped__()
    assert not hardware._has_cuda.__wrapped__()
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr("ctypes.CDLL", lambda name: pytest.fail("Linux's own"))
    end_with_parent()
    give_back_memory()


STARTED = [sys.executable, "-c", "import sys; from rrlhf.cli import main; sys.argv[0] = 'rrlhf'; main()"]


@pytest.mark.slow  # starts Python
@pytest.mark.parametrize("streams", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_process_without_a_terminal_or_any_stream_works(project, streams):
    command = ["sh", "-c", f'"$@" plan --profile tiny {streams}', "sh", *STARTED]
    done = subprocess.run(command, cwd=project, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0


@pytest.mark.slow  # starts Python
@pytest.mark.parametrize("more", [{}, {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}])
def test_another_locale_reads_the_same_files(project, more):
    params = project / "params.yaml"
    params.write_text("# größer\n" + params.read_text(encoding="utf-8"), encoding="utf-8")
    environment = os.environ | {"LC_ALL": "C", "LANG": "C", "PYTHONPATH": str(ROOT)} | more
    done = subprocess.run([*STARTED, "plan", "--profile", "tiny"], cwd=project, env=environment, capture_output=True)
    assert (done.returncode, b"never made here" in done.stdout) == (0, True), done.stderr


WORKING = """
import time
from rrlhf.stopping import STOPPING, stop_between_steps
stop_between_steps(STOPPING)
print("working", flush=True)
while True:
    time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_a_process_at_once(number):
    with subprocess.Popen(
        [sys.executable, "-c", WORKING], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout.readline() == "working\n"
        process.send_signal(number)
        assert process.stderr.readline() == "\n"
        assert "once more stops at once" in process.stderr.readline()
        assert process.poll() is None
        process.send_signal(number)
        assert process.wait(timeout=20) == 128 + number


def test_what_a_stage_leaves_in_cycles_goes_at_its_end_and_later_cycles_too():
    class Cycle:
        def __init__(self):
            self.itself = self

    before, made = Cycle(), []
    gone = weakref.ref(before)
    with releasing_memory():
        made.append(weakref.ref(Cycle()))
    assert made[0]() is None
    del before
    gc.collect()
    assert gone() is None
