"""`rrlhf sweep`: a grid of settings as one flow."""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import Annotated

import typer

from rrlhf.command_line import AsJson, Profile, Set, overrides


def sweep(
    settings: Annotated[list[str], typer.Argument(metavar="PATH=VALUE,VALUE,...", help="Settings with their values.")],
    profile: Profile = "default",
    set_: Set = None,
    as_json: AsJson = False,
) -> None:
    """Make and compare the policies of every point of a grid; what is equal at several points is made once.

    A path is a setting as --set takes it; `arms.*.seed` means that of every arm. Values of a seed are repetitions, over
    which intervals are taken; without them intervals are over prompts. In MLflow all runs are below that of the sweep,
    and no alias moves. A policy that diverges is told and left out.

    Example: rrlhf sweep arms.robust.nominal_weight=0,0.2,0.4 arms.*.seed=1,2,3

    Example: rrlhf sweep ensemble.heads=3,5,9 --set ppo.updates=15
    """
    from rrlhf.params import load_params
    from rrlhf.running.starting import started
    from rrlhf.sweeps.grid import parse_grid, points

    root = Path.cwd()
    changed = overrides(profile, set_)
    params, grid = load_params(root, profile, changed), parse_grid(settings)
    asked = points(grid, params)
    for point in asked:
        load_params(root, profile, changed | point.overrides)
    print(f"{len(asked)} points", file=sys.stderr, flush=True)
    flow = started(root, params.tracking.experiment, "flows.sweep").sweep
    with redirect_stdout(sys.stderr) if as_json else nullcontext():
        result = flow(profile=profile, grid=grid, overrides=changed)
    print(json.dumps(result, indent=1) if as_json else f"\nfiles: {', '.join(result['files'])}")
