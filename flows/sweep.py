"""The product at every point of a grid, and one comparison at the end."""

from __future__ import annotations

from typing import Any

from prefect import flow
from prefect.runtime import flow_run
from prefect.task_runners import ThreadPoolTaskRunner

from rrlhf.execution.sweep import made_at_every_point
from rrlhf.pipeline.params import run_name


def called() -> str:
    """Return the name of the flow run that is beginning."""
    given = flow_run.parameters
    return run_name(given["profile"], (given["grid"] or {}) | (given["overrides"] or {}))


@flow(
    name="reward-robust-rlhf-sweep",
    flow_run_name=called,
    persist_result=False,
    task_runner=ThreadPoolTaskRunner(max_workers=64),  # type: ignore[arg-type]
)
def sweep(
    profile: str = "default",
    grid: dict[str, list[Any]] | None = None,
    overrides: dict[str, Any] | None = None,
    baseline: str | None = None,
    name: str | None = None,
) -> dict[str, Any]:
    """Make the policies of every point of a grid, and compare them.

    grid: values by dotted name, {"arms.robust.nominal_weight": [0, 0.4], "arms.*.seed": [1, 2, 3]}. Values of a seed
    are repetitions. A policy that is the same at every point is made and compared once. baseline: a policy that the
    others are compared with, seed by seed. name: of the sweep's files. Returns the tables, what ran, and the files that
    were written.
    """
    return made_at_every_point(profile, grid or {}, overrides or {}, baseline, name)
