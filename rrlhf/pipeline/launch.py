"""Starting a stage from its key document: in this process, in another, or in several under `accelerate launch`.

The key document and the input folders are all that reaches a stage, so nothing outside its key can change its result.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from rrlhf.config import AnyArm, Launch, Member, Params, Section, TrunkTraining
from rrlhf.environment import release_memory
from rrlhf.files import CHECKPOINT
from rrlhf.pipeline.artifacts import HISTORY, rows_of
from rrlhf.pipeline.keys import Document
from rrlhf.pipeline.processes import call_in_processes
from rrlhf.pipeline.stages import arm_of, cut_shares, spec_of
from rrlhf.progress import is_main_process
from rrlhf.types import Log


def execute(
    document: Document,
    *,
    inputs: Mapping[str, Path],
    out: Path,
    launch: Launch,
    beside: int = 0,
    max_cut: float = 1.0,
) -> None:
    """Run a stage into `out`, which may hold the checkpoint of an interrupted run; its rows go to history.jsonl.

    beside: how many other stages run at the same time and share the cores. Each then has a process of its own:
    loading a model changes global state of transformers and torch. max_cut: share of any kind of text that may be cut.
    """
    _keep_checkpoint(out)
    processes = launch.processes if spec_of(document["stage"]).processes else 1
    if processes > 1 or beside:
        threads = launch.threads or max(len(os.sched_getaffinity(0)) // (processes + beside), 1)
        call_in_processes(document, inputs=inputs, out=out, max_cut=max_cut, processes=processes, threads=threads)
    else:
        import torch

        torch.set_num_threads(launch.threads or len(os.sched_getaffinity(0)))
        try:
            call(document, inputs=inputs, out=out, log=recorder(out, document["stage"], max_cut))
        finally:
            release_memory()  # arms run in processes of their own while this one waits
    shutil.rmtree(out / CHECKPOINT, ignore_errors=True)  # no part of the result


def call(document: Document, *, inputs: Mapping[str, Path], out: Path, log: Log) -> None:
    """Call the stage's `run` in this process."""
    stage = import_module(f"rrlhf.stages.{document['stage']}")
    stage.run(**typed_sections(document["params"]), **_arguments(inputs), out=out, log=log)


def typed_sections(settings: Mapping[str, Any]) -> dict[str, Section | int]:
    """Rebuild the typed sections from the settings of a key document."""
    types: dict[str, Any] = {name: field.annotation for name, field in Params.model_fields.items()}
    types |= {"arm": AnyArm, "member": Member, "trunk": TrunkTraining}
    return {name: TypeAdapter(types[name]).validate_python(value) for name, value in settings.items()}


def _arguments(inputs: Mapping[str, Path]) -> dict[str, Any]:
    """Name the input folders as a stage's arguments.

    The policies of all arms are one argument, by the arm's name; so are the members of an ensemble, in their order.
    """
    arguments: dict[str, Any] = {}
    for name in sorted(inputs, key=_number):
        if many := spec_of(name.partition("-")[0]).many:
            arguments.setdefault(many, {})[arm_of(name) or name] = inputs[name]
        else:
            arguments[name] = inputs[name]
    return arguments


def _number(name: str) -> int:
    """Return the number of a member, by which they are sorted; nothing else has one."""
    return int(name.removeprefix("member-")) if name.startswith("member-") else 0


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
