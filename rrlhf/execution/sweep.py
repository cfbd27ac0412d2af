"""The product at every point of a grid: mapped tasks, what is equal made once, one comparison at the end."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from prefect import task
from prefect.cache_policies import NO_CACHE

from rrlhf.environment import find_root, set_environment
from rrlhf.execution.nodes import ended, start, take
from rrlhf.execution.pages import Pages
from rrlhf.execution.runners import runner_of
from rrlhf.execution.state import Run, tracked
from rrlhf.judging.evaluation import read_evaluation
from rrlhf.pipeline.check import check_judge, check_sources
from rrlhf.pipeline.decide import Part, chosen
from rrlhf.pipeline.graph import DATA, Node
from rrlhf.pipeline.keys import key_digest
from rrlhf.pipeline.params import load_params, run_name
from rrlhf.pipeline.plan import Project
from rrlhf.pipeline.stages import STAGES, kind_of
from rrlhf.pipeline.tracking.tracker import Tracker
from rrlhf.policy.health import DivergedError, suspected_at
from rrlhf.stopping import STOPPING, stop_between_steps
from rrlhf.tools.reporting.comparison import FIRST
from rrlhf.tools.reporting.tables import show
from rrlhf.tools.sweeps.comparison import Found, compared, evidence
from rrlhf.tools.sweeps.grid import Point, name_of, points, shares, trimmed
from rrlhf.tools.sweeps.show import Sweep, as_markdown, tables, write
from rrlhf.types import Json

ORDER = tuple(dict.fromkeys(kind_of(stage) for stage in STAGES))
User = tuple[Run, Node]


class Share(NamedTuple):
    """What one point adds to a sweep."""

    point: Point
    project: Project
    new: dict[str, dict[str, Json]]  # the settings that change it, by node, of every policy that no earlier point has


def made_at_every_point(
    profile: str, grid: dict[str, list[Any]], given: dict[str, Any], baseline: str | None, name: str | None
) -> dict[str, Any]:
    """Make the policies of every point of a grid, and compare them; flows/sweep.py says what is what."""
    stop_between_steps(STOPPING)
    root = find_root(Path.cwd())
    set_environment(root)
    params = load_params(root, profile, given)
    parts = parts_of(root, profile, given, points(grid, params))
    for part in parts:
        check_sources(part.project, fetch=True)
    check_judge(params.evaluate.judge, (one for part in parts for one in part.project.plan()))
    everything = Project(root, profile, params)
    group = Run(everything, chosen(Part(), everything.nodes), [], Pages(profile), f"sweep {run_name(profile, given)}")
    with runner_of(params.launch) as runner, grouped(group, given, parts) as runs:
        for run in runs:
            run.runner = runner
        for kind in ORDER:
            make_all(kind, runs, params.launch.arms_at_once)
        found = list(findings(runs, parts, register_all(runs)))
        told = Sweep(
            name=name or name_of(profile, grid, given),
            grid=grid,
            overrides=given,
            rows=compared(found),
            evidence=evidence(found, baseline) if baseline else None,
        )
        group.files = report_sweep(group, told, found)
    return {**told.content(), "ran": [name for run in runs for name in run.made], "files": group.files}


def parts_of(root: Path, profile: str, given: dict[str, Any], asked: Sequence[Point]) -> list[Share]:
    """Return what each point adds to the sweep: a project without the policies that an earlier point has.

    Raises ParamsError for the first point whose settings are wrong, and when the grid changes no policy.
    """
    projects = [Project(root, profile, load_params(root, profile, given | point.overrides)) for point in asked]
    found = []
    for point, project, new in zip(asked, projects, shares(asked, [each.nodes for each in projects]), strict=True):
        project.nodes = trimmed(project.nodes, {each.name for each in project.nodes if each.arm} - set(new))
        if set(new) - {"sft"}:
            found.append(Share(point, project, new))
    return found


@contextmanager
def grouped(group: Run, given: dict[str, Any], parts: Sequence[Share]) -> Iterator[list[Run]]:
    """Open a run in MLflow for the sweep, and below it one for each point; close them with how the sweep ended."""
    with ExitStack() as opened:
        opened.enter_context(tracked(group))
        runs = []
        for point, project, _ in parts:
            name = run_name(project.profile, given | point.settings)
            run = Run(project, chosen(Part(), project.nodes), [], Pages(project.profile), name)
            opened.enter_context(tracked(run, group))
            runs.append(run)
        yield runs


def make_all(kind: str, runs: Sequence[Run], at_once: int) -> None:
    """Make the nodes of one kind of all points, those with equal keys once; a policy that diverges is left out."""
    users: dict[str, list[User]] = {}
    for run in runs:
        for node in run.project.nodes:
            if kind_of(node.stage) == kind and (readable := reading_what_is_there(node, run)):
                key = key_digest(run.project.document(readable, run.digests))
                users.setdefault(key, []).append((run, readable))
    keys = list(users)
    for together in (keys[i : i + at_once] for i in range(0, len(keys), at_once)):
        started = [(key, start(users[key][0][1], users[key][0][0], beside=len(together) - 1)) for key in together]
        ended((one for _, one in started), runs[0].runner)
        for key, one in started:
            if one is None:
                continue
            try:
                one.future.result()
            except DivergedError as error:
                print(f"{one.node.name} {error}", file=sys.stderr, flush=True)
                continue
            for run, node in users[key]:
                take(one._replace(node=node), run)


def reading_what_is_there(node: Node, run: Run) -> Node | None:
    """Return the node; the comparison without the policies that diverged, and None when nothing is left to compare."""
    inputs = {argument: name for argument, name in node.inputs.items() if name in run.digests}
    if len(inputs) == len(node.inputs):
        return node
    policies = {each.name for each in run.project.nodes if each.arm}
    return node._replace(inputs=inputs) if policies & set(inputs) else None


@task(cache_policy=NO_CACHE, persist_result=False)
def register_all(runs: Sequence[Run]) -> dict[str, str]:
    """Make sure that MLflow knows every artifact once; return versions by key. No alias moves for a sweep."""
    versions: dict[str, str] = {}
    for run in runs:
        for node in run.project.nodes:
            artifact = run.artifacts.get(node.name)
            if artifact is None or artifact.key in versions or node.name == DATA:
                continue
            told = partial(
                Tracker.register,
                artifact=artifact,
                dataset=run.dataset_of(node),
                profile=run.project.profile,
                parent=run.tracking_id,
            )
            made = run.tell(told)
            versions[artifact.key] = f"{made.name}/{made.version}" if made else ""
    return versions


def findings(runs: Sequence[Run], parts: Sequence[Share], versions: dict[str, str]) -> Iterator[Found]:
    """Yield every policy of every point with its numbers."""
    for run, part in zip(runs, parts, strict=True):
        evaluated = run.artifacts.get("evaluate")
        evaluation = read_evaluation(evaluated.path) if evaluated else None
        judged = {policy.name: policy for policy in evaluation.policies} if evaluation else {}
        arms = {node.name: node.arm for node in part.project.nodes}
        for node, settings in part.new.items():
            artifact, name = run.artifacts.get(node), arms[node] or node
            version = versions[artifact.key] if artifact else None
            if evaluation is None or artifact is None or name not in judged:
                yield Found(settings, name, version, None)
                continue
            policy, curve = judged[name], evaluation.courses.get(name, ())
            alarm = suspected_at(artifact.history()) if artifact.stage == "ppo" else None
            yield Found(settings, name, version, policy.metrics, policy.gold_by_prompt, curve, alarm)


@task(cache_policy=NO_CACHE, persist_result=False)
def report_sweep(group: Run, told: Sweep, found: Sequence[Found]) -> list[str]:
    """Write the comparison as JSON and pictures, keep it with the sweep's run, and show the tables."""
    root = group.project.root
    files = write(told, found, root / "reports" / "sweeps" / told.name)
    for file in files:
        group.tell(partial(Tracker.log_report, run_id=group.tracking_id, html=file))
    show(*tables(told, FIRST))
    written = [str(file.relative_to(root)) for file in files]
    group.pages.sweep(as_markdown(told), written)
    return written
