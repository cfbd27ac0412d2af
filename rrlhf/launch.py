"""Starting a stage from its key document: in this process, or in several under `accelerate launch`.

The key document and the input folders are all that reaches a stage, so nothing outside its key can change its result.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from rrlhf.artifacts import HISTORY
from rrlhf.config import Arm, Launch, Params, Section
from rrlhf.keys import Document
from rrlhf.progress import check_stop, is_main_process

Log = Callable[[dict[str, float]], None]

CHECKPOINT = "checkpoint"  # sub-folder in which a stage keeps what it needs to go on after an interruption
TRAINING = {"sft", "ppo"}  # the stages that several processes share
ROW = "@row "  # starts a line by which the main child process hands a row to its parent
LAST_LINES = 15

_importing = threading.Lock()


class LaunchError(RuntimeError):
    """A stage's processes ended with an error."""


def execute(
    document: Document, *, inputs: Mapping[str, Path], out: Path, log: Log, launch: Launch, beside: int = 0
) -> None:
    """Run a stage into `out`, which may hold the checkpoint of an interrupted run; its rows go to history.jsonl.

    beside: how many other stages run at the same time in this process; they share the cores.
    """
    _keep_checkpoint(out)
    recorded = _recorder(out / HISTORY, document["stage"], log)
    if launch.processes > 1 and document["stage"] in TRAINING:
        _call_in_processes(document, inputs, out, recorded, launch)
        return
    import torch

    cores = launch.threads or len(os.sched_getaffinity(0))
    torch.set_num_threads(max(cores // (beside + 1), 1))  # of this thread
    if beside:
        _import_for_threads()
    call(document, inputs=inputs, out=out, log=recorded)


def call(document: Document, *, inputs: Mapping[str, Path], out: Path, log: Log) -> None:
    """Call the stage's `run` in this process."""
    stage = import_module(f"rrlhf.{document['stage']}")
    stage.run(**_sections(document["params"]), **_arguments(inputs), out=out, log=log)


def _import_for_threads() -> None:
    """Import what transformers looks up lazily, one thread after the other: two at once get an ImportError."""
    with _importing:
        import transformers.models.llama.modeling_llama  # noqa: F401
        from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401


def main(path: Path) -> None:
    """Run one of several processes of a stage, as told by a JSON file."""
    job = json.loads(path.read_bytes())
    inputs = {name: Path(folder) for name, folder in job["inputs"].items()}
    call(job["document"], inputs=inputs, out=Path(job["out"]), log=_to_parent)


def _sections(settings: Mapping[str, Any]) -> dict[str, Section | int]:
    """Rebuild the typed sections from the settings of a key document."""
    classes: dict[str, Any] = {name: field.annotation for name, field in Params.model_fields.items()} | {"arm": Arm}
    return {
        name: classes[name].model_validate(value) if isinstance(value, dict) else value
        for name, value in settings.items()
    }


def _arguments(inputs: Mapping[str, Path]) -> dict[str, Path | dict[str, Path]]:
    """Name the input folders as a stage's arguments; the policies of all arms are one argument."""
    arguments: dict[str, Path | dict[str, Path]] = {k: v for k, v in inputs.items() if not k.startswith("ppo-")}
    policies = {name.removeprefix("ppo-"): folder for name, folder in inputs.items() if name.startswith("ppo-")}
    return arguments | ({"policies": policies} if policies else {})


def _keep_checkpoint(out: Path) -> None:
    """Make `out` ready: of an interrupted run only its checkpoint stays, and the history up to it."""
    resumable = (out / CHECKPOINT).is_dir()
    out.mkdir(parents=True, exist_ok=True)
    for path in out.iterdir():
        if path.name == CHECKPOINT or (resumable and path.name == HISTORY):
            continue
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    (out / HISTORY).touch()


def _recorder(history: Path, stage: str, log: Log) -> Log:
    """Return a log that writes each row, with the seconds passed, before it hands it on."""
    start = time.monotonic()
    first = True

    def record(row: dict[str, float]) -> None:
        nonlocal first
        bad = [f"{name} = {value}" for name, value in row.items() if not math.isfinite(value)]
        if bad:
            raise ValueError(f"{stage}: {', '.join(bad)} at step {row.get('step')}; a smaller learning rate may help")
        if first:
            _forget_from(history, row.get("step", 0))
            first = False
        with history.open("a", encoding="utf-8") as handle:
            handle.write(json.dumps(row | {"seconds": round(time.monotonic() - start, 2)}) + "\n")
        log(row)
        check_stop()

    return record


def _forget_from(history: Path, step: float) -> None:
    """Drop the rows that an interrupted run wrote after its last checkpoint: they are computed again."""
    lines = history.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines if line.endswith("\n") and json.loads(line).get("step", 0) < step]
    history.write_text("".join(kept), encoding="utf-8")


def _call_in_processes(document: Document, inputs: Mapping[str, Path], out: Path, log: Log, launch: Launch) -> None:
    folders = {name: str(folder.resolve()) for name, folder in inputs.items()}
    job = out.with_suffix(".json")
    job.write_text(json.dumps({"document": document, "inputs": folders, "out": str(out.resolve())}), encoding="utf-8")
    command = [sys.executable, "-m", "accelerate.commands.launch", *_launcher_options(launch)]
    last: deque[str] = deque(maxlen=LAST_LINES)
    try:
        with subprocess.Popen(
            [*command, "-m", "rrlhf.launch", job],
            env=os.environ | _child_environment(document, launch),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as process:
            try:
                _hand_on(process.stdout or (), log, last)
            except BaseException:
                process.terminate()
                raise
    finally:
        job.unlink()
    check_stop()
    if process.returncode:
        ended = f"{document['stage']} in {launch.processes} processes ended with {process.returncode}"
        raise LaunchError(f"{ended}:\n{''.join(last)}")


def _hand_on(lines: Iterable[str], log: Log, last: deque[str]) -> None:
    """Log the rows among a process's lines, show all others, and keep the last of these in `last`, in place."""
    for line in lines:
        if line.startswith(ROW):
            log(json.loads(line.removeprefix(ROW)))
        else:
            last.append(line)
            print(line, end="", file=sys.stderr, flush=True)


def _launcher_options(launch: Launch) -> list[str]:
    """Return the options of accelerate's launcher.

    On CPU, too, it is `--multi_gpu` that starts several processes; `--cpu` alone runs one unless MPI is installed.
    A file from `accelerate config` (FSDP, DeepSpeed) takes the place of these options.
    """
    config = os.environ.get("ACCELERATE_CONFIG_FILE")
    processes = ["--num_processes", str(launch.processes)]
    if config:
        return ["--config_file", config, *processes]
    plain = ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    return ["--multi_gpu", *processes, *plain]


def _child_environment(document: Document, launch: Launch) -> dict[str, str]:
    cores = len(os.sched_getaffinity(0))
    on_cpu = document["params"]["model"]["device"] == "cpu"
    return {
        "ACCELERATE_USE_CPU": str(on_cpu).lower(),
        "OMP_NUM_THREADS": str(launch.threads or max(cores // launch.processes, 1)),
    }


def _to_parent(row: dict[str, float]) -> None:
    if is_main_process():
        print(ROW + json.dumps(row), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
