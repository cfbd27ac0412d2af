"""Every place at which a tiny run writes: a kill there, or a disk that is full from there on, and the run again.

`python -m tests.every_write kill` or `... full` tries every place that `--group` names (all, without it) at its first
reach, and prints what did not end as an undisturbed run; `--every 7` every seventh place only. A place is a line of
our own code that has a file opened for writing, renamed, removed or synced, or a database committed, whatever library
does it. What libraries write in native code (safetensors, for one) has its neighbours tried, not itself.

A run is a fork of a process that has everything imported, in a project that is put back as it was before its group.
The disk is a real one, a tmpfs in a mount namespace of its own, filled to the last byte.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

RUN = ["run", "--profile", "tiny", "--set", "arms={single: null, direct: null, choosy: null}"]
GROUPS = {  # in their order: each begins where the one before it ended
    "prepare": [*RUN, "--until", "data"],
    "sft": [*RUN, "--until", "sft"],
    "ensemble": [*RUN, "--until", "ensemble"],
    "ppo": [*RUN, "--set", "health.checkpoint_every=1", "--until", "ppo"],
    "evaluate": [*RUN, "--set", "health.checkpoint_every=1"],
}
EVENTS = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate"}
MEASURED = {"seconds", "tokens_per_second"}
OURS = ("/rrlhf/", "/flows/")
ROOM = 160 * 2**20  # bytes of the disk: a project, and what a run asks for
SECONDS = 180.0  # for which one command may take


class Tried(NamedTuple):
    """How a run ended, and what it said."""

    code: int  # negative: by this signal
    said: str


class Fault:
    """Sees every write of this process, and strikes at one."""

    def __init__(self, root: Path, kind: str, place: str, seen: int) -> None:
        """place: "" strikes nowhere; seen: the descriptor that gets a line for every place, once."""
        self.root, self.kind, self.place, self.seen = str(root), kind, place, seen
        self.reached: set[str] = set()

    def watch(self) -> None:
        """Look at what is written from now on."""
        from sqlalchemy import event
        from sqlalchemy.engine import Engine

        sync = os.fsync
        os.fsync = lambda handle: (self.at("fsync"), sync(handle))[1]
        event.listen(Engine, "commit", lambda connection: self.at("commit"))
        sys.addaudithook(self.audit)

    def audit(self, event: str, arguments: tuple) -> None:
        """See an event of the interpreter."""
        if event == "open":
            path, _, flags = arguments
            if not isinstance(path, str | bytes) or not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                return
        elif event not in EVENTS:
            return
        name = os.fsdecode(arguments[0]) if isinstance(arguments[0], str | bytes | os.PathLike) else ""
        if "__pycache__" not in name and not name.startswith("/dev/"):
            self.at(event)

    def at(self, event: str) -> None:
        """Be at a place; strike if it is the one."""
        frame = sys._getframe(1)
        while frame and not (frame.f_code.co_filename.startswith(self.root) and ours(frame.f_code.co_filename)):
            frame = frame.f_back
        if frame is None:
            return
        place = f"{event} {os.path.relpath(frame.f_code.co_filename, self.root)}:{frame.f_lineno}"
        if place in self.reached:
            return
        self.reached.add(place)
        os.write(self.seen, f"{place}\n".encode())
        if place == self.place and self.kind == "kill":
            os.killpg(0, signal.SIGKILL)
        elif place == self.place:
            fill(Path(self.root).parent)


def ours(name: str) -> bool:
    """Whether a file is of this package or of a project's flows."""
    return any(part in name for part in OURS)


def fill(disk: Path) -> None:
    """Leave no byte on a disk."""
    with (disk / "filler").open("ab", buffering=0) as file, suppress(OSError):
        for size in (2**20, 2**12):
            with suppress(OSError):
                while True:
                    file.write(b"\0" * size)


def forked(work: Callable[[], object]) -> Tried:
    """Do work in a fork, a process group of its own; return how it ended and what it said."""
    with tempfile.TemporaryFile() as told:
        child = os.fork()
        if child == 0:
            _end_with(work, told.fileno())
        give_up = time.monotonic() + SECONDS
        while os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            if time.monotonic() > give_up:
                os.killpg(child, signal.SIGKILL)
            time.sleep(0.02)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        told.seek(0)
        return Tried(code, told.read().decode(errors="replace"))


def _end_with(work: Callable[[], object], told: int) -> None:
    """Do work and end this process as the interpreter would, but without what its parent is to do at its end."""
    code = 70  # of what nobody caught
    try:
        os.setsid()
        os.dup2(told, 1)
        os.dup2(told, 2)
        work()
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    finally:
        if code == 70:
            traceback.print_exc()
        sys.stdout.flush()
        os._exit(code)


def command(root: Path, arguments: list[str], fault: tuple[str, str] = ("", "")) -> tuple[Tried, list[str]]:
    """Run the command in a fork; return how it ended, and the places that it reached."""
    with tempfile.TemporaryFile() as seen:

        def work() -> None:
            from rrlhf.cli import main

            os.chdir(root)
            sys.argv = ["rrlhf", *arguments]
            Fault(root, *fault, seen.fileno()).watch()
            main()

        tried = forked(work)
        seen.seek(0)
        return tried, seen.read().decode().splitlines()


def results(root: Path) -> dict[str, tuple]:
    """Every result's digest and history, less what is measured."""
    found = {}
    for path in sorted(root.glob("artifacts/[!.]*/*/artifact.json")):
        rows = [json.loads(line) for line in (path.parent / "history.jsonl").read_text().splitlines()]
        kept = [{name: value for name, value in row.items() if name not in MEASURED} for row in rows]
        manifest = json.loads(path.read_text())
        found[f"{manifest['name']} {manifest['key'][:8]}"] = (manifest["digest"], kept)
    return found


def unsound(root: Path, arguments: list[str]) -> list[str]:
    """What is wrong in a project after a run with these arguments."""
    found = []
    for asked in (["audit", "--profile", "tiny"], ["status"], ["plan", *arguments[1:], "--json"]):
        tried, _ = command(root, asked)
        if tried.code:
            found.append(f"rrlhf {asked[0]} ended with {tried.code}: {tried.said[-400:]}")
    nodes = json.loads(tried.said[tried.said.index("[") :]) if not tried.code else []
    found += [f"plan: {each['node']} {each['action']}" for each in nodes if each["action"] not in {"reuse", "skip"}]
    return found + untold(root)


def untold(root: Path) -> list[str]:
    """Which runs MLflow has that are neither closed nor tied to a result."""

    def work() -> None:
        from mlflow import MlflowClient

        os.chdir(root)  # the parent's own was removed when the project was put back
        client = MlflowClient(tracking_uri=f"sqlite:///{root}/mlflow.db")
        for run in client.search_runs([client.get_experiment_by_name("rrlhf").experiment_id]):
            tags, status = run.data.tags, run.info.status
            if status == "RUNNING" or (status == "FINISHED" and "rrlhf.key" in tags and "rrlhf.digest" not in tags):
                print(f"MLflow: the run of {tags.get('rrlhf.node', 'a flow')} is {status}")

    return forked(work).said.splitlines()


def put_back(saved: Path, root: Path) -> None:
    """Have a project as it was."""
    shutil.rmtree(root, ignore_errors=True)
    (root.parent / "filler").unlink(missing_ok=True)
    shutil.copytree(saved, root, symlinks=True)


def tried(root: Path, fault: tuple[str, str], arguments: list[str], wanted: dict[str, tuple]) -> tuple[int, list[str]]:
    """Strike at a place, and run again; return how the first ended and what is not as after an undisturbed run."""
    kind, _ = fault
    first, _ = command(root, arguments, fault)
    problems = []
    if kind == "full":
        (root.parent / "filler").unlink(missing_ok=True)
        if first.code < 0 or "Traceback" in first.said or (first.code and not told_full(first.said)):
            problems.append(f"full disk: ended with {first.code}: {first.said[-600:]}")
    elif first.code != -signal.SIGKILL:
        return first.code, ["not reached"]
    again, _ = command(root, arguments)
    if again.code:
        return first.code, [*problems, f"again: ended with {again.code}: {again.said[-600:]}"]
    now = results(root)
    problems += [f"{name} differs" for name in {*wanted, *now} if wanted.get(name) != now.get(name)]
    return first.code, problems + unsound(root, arguments)


def told_full(said: str) -> bool:
    """Whether a command says that the disk has no room."""
    return any(words in said for words in ("no room on the disk", "disk is full", "disk is not full", "No space left"))


def sweep(root: Path, saved: Path, kind: str, groups: list[str], every: int, until: float) -> int:
    """Try places group by group; return how many did not recover."""
    known: set[str] = set()
    bad, count = 0, Counter[str]()
    for group, arguments in GROUPS.items():
        shutil.rmtree(saved, ignore_errors=True)
        shutil.copytree(root, saved, symlinks=True)
        plain, places = command(root, arguments)
        assert plain.code == 0, plain.said
        wanted = results(root)
        new = [place for place in places if place not in known]
        known |= {*places}
        chosen = new[::every] if group in groups else []
        if chosen:
            shutil.copytree(root, after := saved.with_name("after"), symlinks=True, dirs_exist_ok=True)
            put_back(saved, root)
            command(root, arguments)
            assert results(root) == wanted, f"{group}: an undisturbed run does not repeat itself"
            print(f"{group}: {len(new)} places, {len(chosen)} to try", flush=True)
        for place in chosen:
            if time.monotonic() > until:
                print(f"{group}: no time for {place}", flush=True)
                count["left"] += 1
                continue
            put_back(saved, root)
            code, problems = tried(root, (kind, place), arguments, wanted)
            count["tried"] += 1
            bad += bool(problems)
            print(f"{group}  {place}  ended with {code}; {'; '.join(problems) or 'recovered'}", flush=True)
        if chosen:
            put_back(after, root)
            shutil.rmtree(after)
    print(f"{kind}: {dict(count)}, not recovered: {bad}", flush=True)
    return bad


def main() -> None:
    """Try what is asked for, on a disk of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=["kill", "full"])
    parser.add_argument("--group", action="append", choices=list(GROUPS))
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=600.0)
    asked = parser.parse_args()
    if os.environ.get("RRLHF_DISK") is None:  # a namespace of mounts, where this user may have a disk
        os.environ["RRLHF_DISK"] = tempfile.mkdtemp(prefix="every-write-")
        os.execvp("unshare", ["unshare", "-rm", sys.executable, "-m", "tests.every_write", *sys.argv[1:]])
    disk = Path(os.environ.pop("RRLHF_DISK"))
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={ROOM}", "none", str(disk)], check=True)
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    from conftest import copy_project

    root, saved = copy_project(disk / "project"), Path(tempfile.mkdtemp(prefix="every-write-saved-"), "project")
    os.environ["PREFECT_HOME"] = str(saved.parent / "prefect")
    until = time.monotonic() + 60 * asked.minutes
    from rrlhf.environment import set_environment
    from rrlhf.tools.serving import start_temporary_server

    set_environment(root)
    home = saved.parent / "server"
    home.mkdir()
    ready = start_temporary_server(home)
    sys.path.insert(0, str(root))
    for name in [name for name in sys.modules if name.split(".")[0] in {"rrlhf", "flows"}]:
        del sys.modules[name]  # from here on those of the project, whose lines are told
    import_everything()
    ready()
    bad = 1
    try:
        bad = sweep(root, saved, asked.kind, asked.group or list(GROUPS), asked.every, until)
    finally:
        shutil.rmtree(saved.parent, ignore_errors=True)
        os.chdir("/")
        subprocess.run(["umount", "--lazy", str(disk)], check=False)
        disk.rmdir()
    raise SystemExit(min(bad, 1))


def import_everything() -> None:
    """Import what runs need, once for all forks."""
    import importlib

    for name in ("torch", "transformers", "mlflow", "mlflow.sklearn", "prefect", "dvc.repo", "dvc.api", "accelerate"):
        with suppress(ImportError):
            importlib.import_module(name)
    importlib.import_module("rrlhf.cli")
    importlib.import_module("flows.pipeline")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main()
