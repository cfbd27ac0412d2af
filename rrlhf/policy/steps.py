"""Optimizer steps on batches that are known beforehand, which go on after an interruption as if there had been none."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast

from rrlhf.files import CHECKPOINT
from rrlhf.policy.checkpoint import Checkpoints, State, Trained
from rrlhf.progress import Interrupted, track
from rrlhf.types import Log, Metrics

SECONDS_BETWEEN_CHECKPOINTS = 600.0  # what a kill costs at most; a run that is asked to stop saves its last step


def shuffled(rows: int, size: int, epochs: int, seed: int) -> list[list[int]]:
    """Return the batches of all epochs; each epoch has all rows in an order of its own, its last batch the rest."""
    generator = torch.Generator().manual_seed(seed)
    orders = (torch.randperm(rows, generator=generator) for _ in range(epochs))
    return [batch.tolist() for order in orders for batch in order.split(size)]


def take_steps(
    engine: Accelerator,
    trained: Trained,
    step: Callable[[int], Metrics],
    total: int,
    *,
    label: str,
    log: Log,
    out: Path,
    made_for: Mapping[str, Any],
) -> None:
    """Take the steps 0 to `total` - 1 and log each one's metrics.

    Goes on from the checkpoint in `out`, if there is one for the settings `made_for`, and then logs the rows before it
    again. `step` may depend on nothing but its number and what `trained` holds.
    """
    with Checkpoints(out / CHECKPOINT, engine, made_for) as checkpoints:
        saved = checkpoints.newest()
        rows: list[Metrics] = saved.notes["rows"] if saved else []
        if saved:
            trained.put_back(saved)
        clock = time.monotonic()

        def save() -> None:
            checkpoints.save(len(rows), State(trained.tensors(), {}, {**trained.notes(), "rows": rows}))

        def taken() -> Iterator[Metrics]:
            for number in range(len(rows), total):
                rows.append(step(number))
                yield rows[-1]

        try:
            for row in track(chain(list(rows), taken()), total, label):
                log(row)
                if _agreed(engine, time.monotonic() - clock > SECONDS_BETWEEN_CHECKPOINTS):
                    save()
                    clock = time.monotonic()
        except Interrupted:
            if engine.num_processes == 1 and len(rows) < total:  # processes hear of it at different steps
                save()
                print(f"{label}: saved after step {len(rows)}", file=sys.stderr, flush=True)
            raise


def _agreed(engine: Accelerator, wanted: bool) -> bool:
    """Return what the main process wants, in all of them: their clocks differ."""
    if engine.num_processes == 1:
        return wanted
    return bool(broadcast(torch.tensor([float(wanted)], device=engine.device)))
