"""A stage in other processes: starting them, handing on what they print, and telling their errors as this one's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from threading import Thread
from typing import IO, Any

from rrlhf.environment import end_with_parent
from rrlhf.located import MendableError
from rrlhf.pipeline.keys import Document
from rrlhf.policy.health import DivergedError
from rrlhf.progress import say
from rrlhf.redact import redacted
from rrlhf.sourcecode import changed_since
from rrlhf.stopping import check_stop, stop_between_steps

LAST_LINES = 15
INTERRUPTED = 130


class LaunchError(MendableError):
    """A stage's processes ended with an error."""


def call_in_processes(
    document: Document, *, inputs: Mapping[str, Path], out: Path, max_cut: float, processes: int, threads: int
) -> None:
    """Call a stage's `run` in processes of its own, each with `threads` CPU threads.

    Raises DivergedError as the stage does, LaunchError with what the processes said last when they ended otherwise,
    and Interrupted when this process was asked to stop.
    """
    folders = {name: str(folder.resolve()) for name, folder in inputs.items()}
    job, problem = out.with_suffix(".json"), out.with_suffix(".problem")
    told: dict[str, Any] = {"document": document, "inputs": folders, "out": str(out.resolve()), "max_cut": max_cut}
    job.write_text(json.dumps(told), encoding="utf-8")
    problem.unlink(missing_ok=True)
    on_cpu = document["params"]["model"]["device"] == "cpu"
    last: deque[str] = deque(maxlen=LAST_LINES)
    try:
        with subprocess.Popen(
            [sys.executable, *(_launcher(processes) if processes > 1 else ()), "-m", "rrlhf.pipeline.processes", job],
            env=os.environ | {"ACCELERATE_USE_CPU": str(on_cpu).lower(), "OMP_NUM_THREADS": str(threads)},
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
        raise LaunchError(found.get("said") or f"{ended} ended with {process.returncode}:\n" + "\n".join(last))


def _hand_on(lines: IO[str], last: deque[str]) -> None:
    """Print what the processes print, and keep the last lines."""
    for line in lines:
        last.append(line.rstrip("\n"))
        say(last[-1])


def _launcher(processes: int) -> list[str]:
    """Return the call of accelerate's launcher.

    On CPU, too, it is `--multi_gpu` that starts several processes; `--cpu` alone runs one unless MPI is installed.
    A file from `accelerate config` takes the place of these options.
    """
    config = os.environ.get("ACCELERATE_CONFIG_FILE")
    command = ["-m", "accelerate.commands.launch", "--num_processes", str(processes)]
    if config:
        return [*command, "--config_file", config]
    plain = ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    return [*command, "--multi_gpu", *plain]


def main(path: Path) -> int:
    """Run a stage in this process, as told by a JSON file; return the exit code."""
    from rrlhf.pipeline.launch import call, recorder

    end_with_parent()
    stop_between_steps()
    job, problem = json.loads(path.read_bytes()), path.with_suffix(".problem")
    inputs, out = {name: Path(folder) for name, folder in job["inputs"].items()}, Path(job["out"])
    try:
        _check_functions(job["document"])
        call(job["document"], inputs=inputs, out=out, log=recorder(out, job["document"]["stage"], job["max_cut"]))
    except KeyboardInterrupt:
        return INTERRUPTED
    except (DivergedError, ValueError, OSError) as error:
        # of whichever process: each has its own responses, and its own errors
        problem.write_text(json.dumps({"diverged": isinstance(error, DivergedError), "said": redacted(str(error))}))
        return 1
    return 0


def _check_functions(document: Document) -> None:
    """Raise ValueError when the reward functions' code is not that of the key: this process imports it anew."""
    if changed := changed_since(document.get("functions", {}), Path.cwd()):
        raise ValueError(f"{', '.join(changed)} changed since the run began, and its results would have the wrong key")


if __name__ == "__main__":
    raise SystemExit(main(Path(sys.argv[1])))
