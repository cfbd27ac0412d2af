"""`rrlhf sweep` and `rrlhf experiment`: a grid of settings as one flow."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rrlhf.tools.command_line import AsJson, Profile, Set, overrides
from rrlhf.types import Json

if TYPE_CHECKING:
    from rrlhf.tools.sweeps.grid import Grid


def sweep(
    settings: Annotated[list[str], typer.Argument(metavar="PATH=VALUE,VALUE,...", help="Settings with their values.")],
    profile: Profile = "default",
    set_: Set = None,
    baseline: Annotated[
        str | None, typer.Option(metavar="POLICY", help="Compare all others with this one, seed by seed.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make and compare the policies of every point of a grid; what is equal at several points is made once.

    A path is a setting as --set takes it; `arms.*.seed` means that of every arm. Values of a seed are repetitions, over
    which intervals are taken; without them intervals are over prompts. In MLflow all runs are below that of the sweep,
    and no alias moves. A policy that diverges is told and left out.

    Example: rrlhf sweep arms.robust.nominal_weight=0,0.2,0.4 seed=1,2,3 --baseline single

    Example: rrlhf sweep ensemble.heads=3,5,9 --set ppo.updates=15
    """
    from rrlhf.tools.sweeps.grid import parse_grid

    _carried_out(profile, overrides(set_), parse_grid(settings), baseline, None, as_json)


def experiment(
    name: Annotated[str | None, typer.Argument(help="A file of experiments/; without one: list them.")] = None,
    set_: Set = None,
    as_json: AsJson = False,
) -> None:
    """Run a sweep that is written down in experiments/, and write its tables and figures to reports/sweeps/NAME.

    Interrupted, it goes on where it was: what is made is made. Without a name the experiments are listed.

    Example: rrlhf experiment robust
    """
    from rrlhf.tools.sweeps.grid import experiments, load_experiment

    root = Path.cwd()
    if name is None:
        known = {each: load_experiment(root, each).question for each in experiments(root)}
        print(json.dumps(known, indent=1) if as_json else "\n".join(f"{each}: {asks}" for each, asks in known.items()))
        return
    found = load_experiment(root, name)
    _carried_out(found.profile, {**found.settings, **overrides(set_)}, found.sweep, found.baseline, name, as_json)


def _carried_out(
    profile: str, changed: Mapping[str, Json], grid: Grid, baseline: str | None, name: str | None, as_json: bool
) -> None:
    from rrlhf.located import ParamsError, did_you_mean
    from rrlhf.pipeline.params import load_params
    from rrlhf.tools.serving import started
    from rrlhf.tools.sweeps.grid import points

    root = Path.cwd()
    params = load_params(root, profile, changed)
    if baseline is not None and baseline not in {"sft", *params.arms}:
        raise ParamsError(f"unknown policy {baseline!r} to compare with{did_you_mean(baseline, ['sft', *params.arms])}")
    asked = points(grid, params)
    for point in asked:
        load_params(root, profile, {**changed, **point.overrides})
    print(f"{len(asked)} points", file=sys.stderr, flush=True)
    flow = started(root, params.tracking.experiment, "sweep")
    with redirect_stdout(sys.stderr) if as_json else nullcontext():
        result = flow(profile=profile, grid=grid, overrides=dict(changed), baseline=baseline, name=name)
    print(json.dumps(result, indent=1) if as_json else f"\nfiles: {', '.join(result['files'])}")
