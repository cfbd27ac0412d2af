"""What a command says, and how it ends, when the system refuses it something."""

import itertools
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from rrlhf import environment
from rrlhf.cli import COMMANDS, app
from rrlhf.environment import FullError, check_room, telling_full_disk
from rrlhf.pipeline.decide import Part
from rrlhf.pipeline.plan import Planned, room
from rrlhf.tools import command_line
from rrlhf.tools.command_line import mending
from rrlhf.tools.running.status import noted

ROOT = Path(__file__).parents[2]


@pytest.fixture
def command(project, monkeypatch, typed):
    """The command, in a project's folder; everything that it changes is put back."""
    (project / "profiles" / "deep").mkdir()
    monkeypatch.chdir(project / "profiles" / "deep")
    for name in ("PATH", "PREFECT_API_URL"):
        monkeypatch.setenv(name, "")
    monkeypatch.delenv("PREFECT_API_URL")
    return typed


def test_a_run_on_a_nearly_full_disk_starts_nothing(command, project, monkeypatch):
    monkeypatch.setattr(environment, "ROOM", 2**62)
    code, _, told = command("run", "--profile", "tiny")
    assert code == 1
    assert f"{project}: no room on the disk: {2**62:,} bytes or more are needed, " in told
    assert "are free. Make room" in told
    assert not (project / ".rrlhf" / "serve").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has a device that is always full")
def test_a_disk_that_is_full_when_something_is_written_is_told_with_the_room_left(capsys):
    with pytest.raises(SystemExit) as ended, mending():
        Path("/dev/full").write_text("anything")
    assert ended.value.code == 1
    assert re.search(r"no room on the disk: .*, [\d,]+ are free", capsys.readouterr().err)


def test_a_library_that_fails_on_a_full_disk_ends_a_stage_with_one_reason(tmp_path, monkeypatch):
    def fails(text):
        with telling_full_disk(tmp_path):
            raise RuntimeError(text)

    with pytest.raises(RuntimeError, match="else"):
        fails("something else")
    with pytest.raises(FullError, match=re.escape(f"{tmp_path}: no room on the disk")):
        fails("Error while serializing: No space left on device (os error 28)")
    monkeypatch.setattr(environment, "FULL", 2**62)
    with pytest.raises(FullError, match=r"bytes or more are needed|takes more"):
        fails("something else")


def test_a_run_begins_with_room_for_what_earlier_ones_left(tmp_path):
    check_room(tmp_path, 2**20)
    with pytest.raises(FullError, match=rf"{2**62 + environment.ROOM:,} bytes or more are needed"):
        check_room(tmp_path, 2**62)
    before = [("sft", "run", 30), ("ppo", "upstream", 4), ("x", "reuse", 9)]
    assert room(Planned(node, action, [], None, size=size) for node, action, size in before) == 68


def test_whatever_fails_on_a_full_disk_has_one_reason_and_elsewhere_keeps_its_trace(monkeypatch, capsys):
    def failing():
        with mending():
            raise RuntimeError("database or disk is full")

    with pytest.raises(RuntimeError):
        failing()
    monkeypatch.setattr(command_line, "FULL", 2**62)
    monkeypatch.setattr(environment, "ROOM", 2**62)
    with pytest.raises(SystemExit) as ended:
        failing()
    assert ended.value.code == 1
    assert "no room on the disk" in capsys.readouterr().err


@pytest.mark.skipif(not Path("/sys/kernel").is_dir(), reason="Linux lets nobody write there")
@pytest.mark.parametrize("arguments", ["plan", "status", "run --profile tiny", "lineage x"])
def test_a_folder_that_cannot_be_written_is_told_in_one_line(command, project, arguments):
    (project / ".rrlhf").symlink_to("/sys/kernel")
    code, _, told = command(*arguments.split())
    assert code == 1
    [line] = told.splitlines()
    assert line.startswith(f"{project}/.rrlhf/prefect: ")
    assert "it has to be writable" in line


UNKNOWN = """
import sys
from rrlhf.cli import main
for command in ("lineage nope", "chat nope -p hi", "evaluate-reward nope", "promote nope", "reproduce nope"):
    sys.argv = ["rrlhf", *command.split()]
    try:
        main()
    except SystemExit as ended:
        print(command, ended.code, "torch" in sys.modules)
"""


def test_an_unknown_model_is_told_as_a_mistake_before_anything_heavy_is_imported(project, database):
    shutil.copy(database, project)
    environment = {name: value for name, value in os.environ.items() if name != "MLFLOW_TRACKING_URI"}
    done = subprocess.run(
        [sys.executable, "-c", UNKNOWN], cwd=project, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == [
        "lineage nope 2 False",
        "chat nope -p hi 2 False",
        "evaluate-reward nope 2 False",
        "promote nope 2 False",
        "reproduce nope 2 False",
    ]
    assert done.stderr.splitlines() == ["no model 'nope'; none is registered yet"] * 5


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("command", ["", *(each.__name__.replace("_", "-") for each in COMMANDS)])
def test_help_breaks_lines_only_where_the_terminal_ends(command, width):
    asked = [*command.split(), "--help"]
    shown = CliRunner(env={"COLUMNS": str(width), "TERM": "dumb"}).invoke(app, asked).output
    prose = shown.partition("Usage:")[2].partition("\n")[2].partition("╭─")[0]
    for paragraph in re.split(r"\n\s*\n", prose.strip()):
        lines = [line.strip() for line in paragraph.splitlines()]
        for line, after in itertools.pairwise(lines):
            assert len(line) + 1 + len(after.split()[0]) > width - 2, line


@pytest.mark.parametrize(
    ("arguments", "kind"),
    [
        ("lineage rrlhf-policy@candidate --out profiles", "directory"),
        ("toy --out params.yaml", "file"),
        ("evaluate-reward --out params.yaml", "file"),
    ],
)
def test_a_place_that_cannot_be_written_is_told_before_the_work(command, arguments, kind):
    code, out, told = command(*arguments.split())
    assert (code, out) == (2, "")
    assert f"is a {kind}" in " ".join(told.replace("│", " ").split())


def test_a_reader_that_goes_away_is_no_error(project):
    listed = [sys.executable, "-m", "rrlhf", "plan", "--profile", "tiny"]
    with subprocess.Popen(listed, cwd=project, stdout=-1, stderr=-1) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 128 + signal.SIGPIPE


INTERRUPTED = """
import sys
class Interrupting:
    def find_spec(name, *_):
        if name == "rrlhf.cli":
            raise KeyboardInterrupt
sys.meta_path.insert(0, Interrupting)
from rrlhf.__main__ import main
main()
"""


def test_ctrl_c_while_modules_are_imported_leaves_no_trace():
    done = subprocess.run([sys.executable, "-c", INTERRUPTED], cwd=ROOT, capture_output=True)
    assert (done.returncode, done.stderr) == (130, b"")


def test_characters_that_the_output_does_not_have_are_replaced(project):
    with noted(project, "tiny", {"arms.größe": None}, Part()):
        pass
    asked = [sys.executable, "-m", "rrlhf", "status"]
    done = subprocess.run(asked, cwd=project, env=os.environ | {"PYTHONIOENCODING": "ascii"}, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"--set 'arms.gr??e=null'" in done.stdout


@pytest.mark.slow
def test_a_service_that_does_not_start_is_told_with_the_end_of_its_log(project):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        asked = [sys.executable, "-m", "rrlhf", "serve", "--prefect-port", port]
        done = subprocess.run(asked, cwd=project, env=os.environ, capture_output=True, text=True)
    assert done.returncode == 1
    assert f"its log, {project}/.rrlhf/serve/prefect-server.log, ends with" in done.stderr
    assert f"Port {port} is already in use" in done.stderr
