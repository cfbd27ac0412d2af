"""Starting a stage from its key document: in this process, in another, or in several under `accelerate launch`.

The key document and the input folders are all that reaches a stage, so nothing outside its key can change its result.
"""

import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from threading import Thread
from typing import IO, Any

from pydantic import TypeAdapter

from rrlhf.config import AnyArm, Given, Launch, Member, Params, Section, TrunkTraining
from rrlhf.environment import SHARDING, end_with_parent, releasing_memory, spare_collector
from rrlhf.files import CHECKPOINT
from rrlhf.hardware import cores
from rrlhf.located import MendableError
from rrlhf.pipeline.artifacts import HISTORY, rows_of
from rrlhf.pipeline.keys import Document
from rrlhf.pipeline.stages import arm_of, cut_shares, spec_of
from rrlhf.policy.health import DivergedError
from rrlhf.progress import is_main_process, say
from rrlhf.redact import redacted
from rrlhf.sourcecode import changed_since
from rrlhf.stopping import check_stop, stop_between_steps
from rrlhf.types import Log

LAST_LINES = 15
LAUNCHER = (
    "from rrlhf.environment import end_with_parent as end; end(); from accelerate.commands.launch import main; main()"
)
KILLED = re.compile(r"Signal \d+ \((SIGKILL)\) received by PID")  # so says accelerate's launcher of a process


class LaunchError(MendableError):
    """A stage's processes ended with an error."""


def execute(
    document: Document,
    *,
    inputs: Mapping[str, Path],
    out: Path,
    launch: Launch,
    lock: IO[str] | None = None,
    beside: int = 0,
    max_cut: float = 1.0,
) -> None:
    """Run a stage into `out`, which may hold the checkpoint of an interrupted run; its rows go to history.jsonl.

    beside: how many other stages run at the same time and share the cores. Each then has a process of its own:
    loading a model changes global state of transformers and torch. max_cut: share of any kind of text that may be cut.
    lock: under which `out` is written; processes that outlive this one hold it until they end.
    """
    _keep_checkpoint(out)
    processes = launch.processes if spec_of(document["stage"]).processes else 1
    if processes > 1 or beside:
        threads = launch.threads or max(cores() // (processes + beside), 1)
        launch = launch.model_copy(update={"processes": processes, "threads": threads})
        call_in_processes(document, inputs=inputs, out=out, max_cut=max_cut, launch=launch, lock=lock)
    else:
        import torch

        torch.set_num_threads(launch.threads or cores())
        with releasing_memory():  # arms run in processes of their own while this one waits
            call(document, inputs=inputs, out=out, log=recorder(out, document["stage"], max_cut))
    shutil.rmtree(out / CHECKPOINT, ignore_errors=True)  # no part of the result


def call(document: Document, *, inputs: Mapping[str, Path], out: Path, log: Log) -> None:
    """Call the stage's `run` in this process."""
    stage = import_module(f"rrlhf.stages.{document['stage']}")
    stage.run(**typed_sections(document["params"]), **_arguments(inputs), out=out, log=log)


def typed_sections(settings: Mapping[str, Any]) -> dict[str, Section | int]:
    """Rebuild the typed sections from the settings of a key document."""
    types: dict[str, Any] = {name: field.annotation for name, field in Params.model_fields.items()}
    types |= {"arm": AnyArm, "given": Given, "member": Member, "trunk": TrunkTraining}
    return {name: TypeAdapter(types[name]).validate_python(value) for name, value in settings.items()}


def _arguments(inputs: Mapping[str, Path]) -> dict[str, Any]:
    """Name the input folders as a stage's arguments.

    The policies of all arms are one argument, by the arm's name; so are the members of an ensemble, in their order.
    """
    arguments: dict[str, Any] = {}
    for name in sorted(inputs, key=_place):
        if many := spec_of(name.partition("-")[0]).many:
            arguments.setdefault(many, {})[arm_of(name) or name] = inputs[name]
        else:
            arguments[name] = inputs[name]
    return arguments


def _place(name: str) -> tuple[str, int]:
    """Return by what members are sorted, their stage and number; all else keeps its order."""
    stage, _, number = name.partition("-")
    return (stage, int(number)) if spec_of(stage).many == "members" else ("", 0)


def _keep_checkpoint(out: Path) -> None:
    """Make `out` ready: of an interrupted run only its checkpoint stays, and the history up to it."""
    resumable = (out / CHECKPOINT).is_dir()
    out.mkdir(parents=True, exist_ok=True)
    for path in out.iterdir():
        if path.name == CHECKPOINT or (resumable and path.name == HISTORY):
            continue
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    (out / HISTORY).touch()


def recorder(out: Path, stage: str, max_cut: float) -> Log:
    """Return a log that writes each row, with the seconds passed, to the stage's history.

    Of several processes that share the work the main one writes.

    A resumed stage logs the rows before its checkpoint again: these keep their times, and the clock goes on from there.
    What an interrupted run wrote after its checkpoint is dropped, for it is computed again.
    """
    if not is_main_process():
        return lambda row: None
    before, history = {row.get("step"): row["seconds"] for row in rows_of(out)}, out / HISTORY
    history.write_text("", encoding="utf-8")
    start = time.monotonic()

    def record(row: dict[str, float]) -> None:
        nonlocal start
        bad = [f"{name} = {value}" for name, value in row.items() if not math.isfinite(value)]
        if bad:
            raise ValueError(f"{stage}: {', '.join(bad)} at step {row.get('step')}; a smaller learning rate may help")
        for kind, share in cut_shares(row).items():
            if share > max_cut:
                raise ValueError(
                    f"{stage}: {share:.1%} of its {kind} are cut, where limits.max_cut allows "
                    f"{max_cut:.1%}: raise prompt_tokens or response_tokens, shorten the texts, or raise limits.max_cut"
                )
        seconds = before.pop(row.get("step"), None)
        if seconds is None:
            seconds = round(time.monotonic() - start, 2)
        else:
            start = time.monotonic() - seconds
        with history.open("a", encoding="utf-8") as handle:
            handle.write(json.dumps(row | {"seconds": seconds}) + "\n")

    return record


def call_in_processes(
    document: Document,
    *,
    inputs: Mapping[str, Path],
    out: Path,
    max_cut: float,
    launch: Launch,
    lock: IO[str] | None,
) -> None:
    """Call a stage's `run` in processes of its own, each with `launch.threads` CPU threads.

    Raises DivergedError as the stage does, LaunchError with what the processes said last when they ended otherwise,
    and Interrupted when this process was asked to stop.
    """
    folders = {name: str(folder.resolve()) for name, folder in inputs.items()}
    job, problem = out.with_suffix(".json"), out.with_suffix(".problem")
    told: dict[str, Any] = {"document": document, "inputs": folders, "out": str(out.resolve()), "max_cut": max_cut}
    job.write_text(json.dumps(told), encoding="utf-8")
    problem.unlink(missing_ok=True)
    processes = launch.processes
    last: deque[str] = deque(maxlen=LAST_LINES)
    try:
        with subprocess.Popen(
            [sys.executable, *(launcher(processes) if processes > 1 else ()), "-m", "rrlhf.pipeline.launch", job],
            env=os.environ | told_processes(launch, on_cpu=document["params"]["model"]["device"] == "cpu"),
            stdin=lock or subprocess.DEVNULL,  # the one file that a launcher, too, hands on to what it starts
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        ) as process:
            assert process.stdout
            reading = Thread(target=_hand_on, args=(process.stdout, last))
            reading.start()
            try:
                while process.poll() is None:
                    check_stop()
                    time.sleep(0.05)
            except BaseException:
                process.terminate()  # it saves what it can go on from, and says so
                raise
            finally:
                reading.join()
        check_stop()
        found = json.loads(problem.read_bytes()) if problem.exists() else {}
    finally:
        job.unlink()
        problem.unlink(missing_ok=True)
    if found.get("diverged"):
        raise DivergedError(found["said"])
    if process.returncode:
        ended = f"{document['stage']} in {processes} processes" if processes > 1 else document["stage"]
        ended += f" ended with {process.returncode}"
        if killed := KILLED.search("\n".join(last)):
            ended += (
                f": one of them was killed ({killed[1]}), as the system does when memory runs out; the same command "
            )
            ended += "goes on from the last checkpoint. They said last"
        raise LaunchError(found.get("said") or f"{ended}:\n" + "\n".join(last))


def told_processes(launch: Launch, *, on_cpu: bool) -> dict[str, str]:
    """Return what the processes of a launch find in their environment."""
    threads = {"OMP_NUM_THREADS": str(launch.threads)}
    return {"ACCELERATE_USE_CPU": str(on_cpu).lower(), SHARDING: launch.sharding} | threads


def _hand_on(lines: IO[str], last: deque[str]) -> None:
    """Print what the processes print, and keep the last lines."""
    for line in lines:
        last.append(line.rstrip("\n"))
        say(last[-1])


def launcher(processes: int) -> list[str]:
    """Return the call of accelerate's launcher.

    On CPU, too, it is `--multi_gpu` that starts several processes; `--cpu` alone runs one unless MPI is installed.
    A file from `accelerate config` takes the place of these options.
    """
    config = os.environ.get("ACCELERATE_CONFIG_FILE")
    command = ["-c", LAUNCHER, "--num_processes", str(processes)]
    if config:
        return [*command, "--config_file", config]
    plain = ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    return [*command, "--multi_gpu", *plain]


def main(path: Path) -> int:
    """Run a stage in this process, as told by a JSON file; return the exit code."""
    end_with_parent()
    spare_collector()
    stop_between_steps()
    job, problem = json.loads(path.read_bytes()), path.with_suffix(".problem")
    inputs, out = {name: Path(folder) for name, folder in job["inputs"].items()}, Path(job["out"])
    try:
        if changed := changed_since(job["document"].get("functions", {}), Path.cwd()):  # it imports them anew
            told = f"{', '.join(changed)} changed since the run began"
            raise ValueError(f"{told}, and its results would have the wrong key")
        call(job["document"], inputs=inputs, out=out, log=recorder(out, job["document"]["stage"], job["max_cut"]))
    except KeyboardInterrupt:
        return 130
    except (DivergedError, ValueError, OSError) as error:
        # of whichever process: each has its own responses, and its own errors
        problem.write_text(json.dumps({"diverged": isinstance(error, DivergedError), "said": redacted(str(error))}))
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main(Path(sys.argv[1])))
