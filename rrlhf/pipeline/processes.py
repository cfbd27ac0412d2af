"""A stage in other processes: starting them, and the messages by which they tell this one their rows and progress."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rrlhf import progress
from rrlhf.environment import end_with_parent
from rrlhf.located import MendableError
from rrlhf.pipeline.keys import Document
from rrlhf.policy.health import DivergedError
from rrlhf.sourcecode import changed_since
from rrlhf.stopping import check_stop, stop_between_steps
from rrlhf.types import Log

MESSAGE = "@rrlhf "  # starts a message to the end of the line: JSON with `row`, `progress`, `diverged` or `error`
LAST_LINES = 15
INTERRUPTED = 130


class LaunchError(MendableError):
    """A stage's processes ended with an error."""


def call_in_processes(
    document: Document, *, inputs: Mapping[str, Path], out: Path, log: Log, processes: int, threads: int
) -> None:
    """Call a stage's `run` in processes of its own, each with `threads` CPU threads; `log` gets its rows.

    Raises DivergedError as the stage does, LaunchError with what the processes said last when they ended otherwise,
    and Interrupted when this process was asked to stop.
    """
    folders = {name: str(folder.resolve()) for name, folder in inputs.items()}
    job = out.with_suffix(".json")
    job.write_text(json.dumps({"document": document, "inputs": folders, "out": str(out.resolve())}), encoding="utf-8")
    on_cpu = document["params"]["model"]["device"] == "cpu"
    told = _Told(log)
    try:
        with subprocess.Popen(
            [sys.executable, *(_launcher(processes) if processes > 1 else ()), "-m", "rrlhf.pipeline.processes", job],
            env=os.environ | {"ACCELERATE_USE_CPU": str(on_cpu).lower(), "OMP_NUM_THREADS": str(threads)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as process:
            try:
                told.listen(process.stdout or ())
            except BaseException:
                process.terminate()
                told.hear_out(process.stdout or ())  # it saves what it can go on from, and says so
                raise
    finally:
        job.unlink()
    check_stop()
    if told.diverged:
        raise DivergedError(told.diverged)
    if process.returncode:
        ended = f"{document['stage']} in {processes} processes" if processes > 1 else document["stage"]
        raise LaunchError(told.error or f"{ended} ended with {process.returncode}:\n{''.join(told.last)}")


class _Told:
    """What the processes of a stage said."""

    def __init__(self, log: Log) -> None:
        self._log = log
        self.error = ""  # in words, where the stage ended with an error that people can mend
        self.diverged = ""  # the same, where its training went wrong
        self.last: deque[str] = deque(maxlen=LAST_LINES)  # lines that are no messages

    def listen(self, lines: Iterable[str]) -> None:
        """Log the rows, show the progress, and hand on all other lines."""
        meters: dict[str, Callable[[int], None]] = {}
        with ExitStack() as shown:
            for line in lines:
                is_message, rest = self._hand_on(line)
                if not is_message:
                    continue
                message = json.loads(rest)
                if "row" in message:
                    self._log(message["row"])
                elif "progress" in message:
                    label, total, done = message["progress"]
                    if label not in meters:
                        meters[label] = shown.enter_context(progress.meter(total, label))
                    meters[label](done)
                else:
                    self.error = message.get("error", self.error)
                    self.diverged = message.get("diverged", self.diverged)
                check_stop()

    def hear_out(self, lines: Iterable[str]) -> None:
        """Hand on what is no message until the processes have ended."""
        for line in lines:
            self._hand_on(line)

    def _hand_on(self, line: str) -> tuple[str, str]:
        """Print what stands before a message, or all of a line that is none; return the message's mark and text."""
        said, is_message, rest = line.partition(MESSAGE)
        if said:
            self.last.append(said if said.endswith("\n") else said + "\n")
            print(self.last[-1], end="", file=sys.stderr, flush=True)
        return is_message, rest


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
    from rrlhf.pipeline.launch import call

    end_with_parent()
    stop_between_steps()
    progress.relay = lambda label, total, done: _tell(progress=[label, total, done])
    job = json.loads(path.read_bytes())
    inputs = {name: Path(folder) for name, folder in job["inputs"].items()}
    try:
        _check_functions(job["document"])
        call(job["document"], inputs=inputs, out=Path(job["out"]), log=lambda row: _tell(row=row))
    except KeyboardInterrupt:
        return INTERRUPTED
    except DivergedError as error:
        _tell(diverged=str(error))
        return 1
    except (ValueError, OSError) as error:
        _send(error=str(error))  # of whichever process: each has its own responses, and its own errors
        return 1
    return 0


def _check_functions(document: Document) -> None:
    """Raise ValueError when the reward functions' code is not that of the key: this process imports it anew."""
    if changed := changed_since(document.get("functions", {}), Path.cwd()):
        raise ValueError(f"{', '.join(changed)} changed since the run began, and its results would have the wrong key")


def _tell(**message: Any) -> None:
    if progress.is_main_process():
        _send(**message)


def _send(**message: Any) -> None:
    sys.stdout.write(f"{MESSAGE}{json.dumps(message)}\n")  # at once: what other processes print would come in between
    sys.stdout.flush()


if __name__ == "__main__":
    raise SystemExit(main(Path(sys.argv[1])))
