"""`rrlhf sweep` and `rrlhf experiment`: a grid of settings, its points, what they share, which policies it changes."""

import hashlib
import itertools
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer
from pydantic import Field, ValidationError

from rrlhf.config import Params, Section
from rrlhf.located import ParamsError, did_you_mean, parse, read
from rrlhf.pipeline.graph import Node
from rrlhf.pipeline.params import load_params
from rrlhf.tools.command_line import AsJson, Profile, Set, overrides
from rrlhf.types import Json

Grid = dict[str, list[Json]]  # values by dotted name; "arms.*.seed" is that of every arm
EXAMPLE = "arms.robust.nominal_weight=0,0.2,0.4"


class Experiment(Section):
    """A sweep that is written down."""

    question: str
    profile: str = "default"
    settings: dict[str, Any] = Field(default_factory=dict)  # what it changes of the profile, as a profile would
    sweep: dict[str, list[Any]]  # by dotted name: values
    baseline: str  # a policy that the others are compared with


class Point(NamedTuple):
    """One point: the swept settings as they were named, and the overrides that they mean."""

    settings: dict[str, Json]
    overrides: dict[str, Json]


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
    from rrlhf.tools.serving import started

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


def experiments(root: Path) -> list[str]:
    """Return the names of the experiments that there are."""
    return sorted(path.stem for path in (root / "experiments").glob("*.yaml"))


def load_experiment(root: Path, name: str) -> Experiment:
    """Read an experiment. Raises ParamsError with every mistake."""
    if name not in experiments(root):
        raise ParamsError(f"unknown experiment {name!r}{did_you_mean(name, experiments(root))}")
    file = root / "experiments" / f"{name}.yaml"
    mistakes: list[str] = []
    try:
        found = Experiment.model_validate(read(file, {}, mistakes))
    except ValidationError as error:
        mistakes.append(f"{file}: {error}")
    if mistakes:
        raise ParamsError("\n".join(mistakes))
    return found


def parse_grid(texts: Iterable[str]) -> Grid:
    """Read "PATH=VALUE,VALUE,...", the values as YAML. Raises ParamsError with every mistake."""
    grid: Grid = {}
    mistakes = []
    for text in texts:
        path, equals, values = text.partition("=")
        try:
            _, listed = parse(values if values.strip().startswith("[") else f"[{values}]", "")
        except ParamsError:
            listed = None
        if not equals or not path.strip() or not isinstance(listed, list) or not listed:
            mistakes.append(f"{text}: expected settings and values, for example {EXAMPLE}")
        elif path.strip() in grid:
            mistakes.append(f"{text}: {path.strip()} is swept twice; name all its values at once")
        else:
            grid[path.strip()] = listed
    if mistakes or not grid:
        raise ParamsError("\n".join(mistakes) or f"name what to sweep, for example {EXAMPLE}")
    return grid


def points(grid: Mapping[str, Sequence[Json]], params: Params) -> list[Point]:
    """Return every combination of values, the last setting's values side by side.

    Raises ParamsError when a value is given twice, or a name with * means no arm.
    """
    for path, values in grid.items():
        if len({json.dumps(value) for value in values}) < len(values):
            raise ParamsError(f"{path}: a value is given twice")
    meant = {path: _meant(path, params) for path in grid}
    found = []
    for values in itertools.product(*grid.values()):
        settings = dict(zip(grid, values, strict=True))
        found.append(Point(settings, {name: settings[path] for path in grid for name in meant[path]}))
    return found


def relevant(asked: Sequence[Point], graphs: Sequence[Sequence[Node]]) -> dict[str, list[str]]:
    """Return, for the SFT model and every policy by its node's name, the swept settings that change it.

    A setting does when two points that differ in nothing else make the policy differently, anywhere up to the data.
    """
    told = [_fingerprints(graph) for graph in graphs]
    names = sorted({node.name for graph in graphs for node in graph if node.arm or node.name == "sft"})
    found: dict[str, list[str]] = {name: [] for name in names}
    for path in asked[0].settings:
        alike: dict[str, list[dict[str, str]]] = {}  # the points that differ in this setting alone
        for point, prints in zip(asked, told, strict=True):
            alike.setdefault(json.dumps(point.settings | {path: None}), []).append(prints)
        for name in names:
            if any(len({prints.get(name) for prints in group}) > 1 for group in alike.values()):
                found[name].append(path)
    return found


def shares(asked: Sequence[Point], graphs: Sequence[Sequence[Node]]) -> list[dict[str, dict[str, Json]]]:
    """Return for each point the policies (and the SFT model) that it is the first to have, with what changes them.

    So each is made and compared once. Raises ParamsError when the grid changes no policy.
    """
    changes = relevant(asked, graphs)
    if len(asked) > 1 and not any(paths for name, paths in changes.items() if name != "sft"):
        raise ParamsError(f"{', '.join(asked[0].settings)}: no policy depends on it, so there is nothing to compare")
    seen: list[tuple[str, dict[str, Json]]] = []
    found = []
    for point, graph in zip(asked, graphs, strict=True):
        here = {name: {path: point.settings[path] for path in paths} for name, paths in changes.items()}
        new = {
            node.name: here[node.name]
            for node in graph
            if node.name in here and (node.name, here[node.name]) not in seen
        }
        seen += new.items()
        found.append(new)
    return found


def trimmed(graph: Iterable[Node], left_out: set[str]) -> list[Node]:
    """Return a graph without some policies, which its comparison then does not read."""
    return [
        node._replace(inputs={argument: name for argument, name in node.inputs.items() if name not in left_out})
        for node in graph
        if node.name not in left_out
    ]


def name_of(profile: str, grid: Mapping[str, Sequence[Json]], overrides: Mapping[str, Json]) -> str:
    """Return a name for a sweep's files, the same for the same sweep."""
    told = json.dumps([profile, grid, overrides], sort_keys=True)
    return f"{profile}-{hashlib.sha256(told.encode()).hexdigest()[:8]}"


def _meant(path: str, params: Params) -> list[str]:
    """Return the settings that a name means: with * in the place of an arm, those of the arms that have it."""
    parts = path.split(".")
    if parts[:2] != ["arms", "*"]:
        return [path]
    having = [name for name, arm in params.arms.items() if len(parts) > 2 and getattr(arm, parts[2], None) is not None]
    if not having:
        raise ParamsError(f"{path}: no arm has such a setting")
    return [".".join(["arms", name, *parts[2:]]) for name in having]


def _fingerprints(graph: Iterable[Node]) -> dict[str, str]:
    """Return a digest of every node's settings and those of all that it reads; `graph` is in order."""
    found: dict[str, str] = {}
    for node in graph:
        inputs = {argument: found[name] for argument, name in sorted(node.inputs.items())}
        told = json.dumps([node.stage, node.settings, inputs, node.functions], sort_keys=True)
        found[node.name] = hashlib.sha256(told.encode()).hexdigest()
    return found
