"""The commands that run the pipeline, and those that say what a run would do: run, plan, why, status, report."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rrlhf.tools.command_line import FAILED, USAGE, AsJson, Profile, Set, end, overrides
from rrlhf.types import Json

if TYPE_CHECKING:
    from rrlhf.pipeline.decide import Part
    from rrlhf.pipeline.graph import Node
    from rrlhf.pipeline.plan import Planned, Project

Names = list[str] | None
From = Annotated[
    Names,
    typer.Option("--from", metavar="STAGE", help="Only this stage and what is built on it; what it reads must be up to "
                 "date. Says what may run, not what must: see --force."),
]  # fmt: skip
Until = Annotated[Names, typer.Option(metavar="STAGE", help="Only this stage and what it is built on.")]
Only = Annotated[Names, typer.Option(metavar="STAGE", help="Only this stage; what it reads must be up to date.")]
Force = Annotated[
    Names,
    typer.Option(metavar="STAGE", help="Compute this stage although its result is there, and compare: the same bits "
                 "rerun nothing below it; others end the run with exit code 3, and the stored result stays."),
]  # fmt: skip
TakeAliases = Annotated[
    bool,
    typer.Option("--take-aliases", help="Give candidate and the arms' aliases to what this run makes, although --set "
                 "changed the settings; otherwise those of the settings as they stand stay."),
]  # fmt: skip
Memory = Annotated[bool, typer.Option("--memory", help="Show instead what every stage will need of memory at most.")]
Verbose = Annotated[bool, typer.Option("-v", "--verbose", help="All reasons, not only the first.")]


def run(
    profile: Profile = "default",
    set_: Set = None,
    from_: From = None,
    until: Until = None,
    only: Only = None,
    force: Force = None,
    take_aliases: TakeAliases = False,
    as_json: AsJson = False,
) -> None:
    """Run what is not up to date, register every model, and write the report.

    A STAGE is a node, such as ppo-robust, or all nodes of one kind: ppo, dpo, member. These options may be repeated;
    --from with --until leaves what lies between them; --only goes with neither. Models that are up to date are
    registered and shown whatever part is asked for.

    When nothing is to be done, nothing is started, and MLflow gets no further run; a server that PREFECT_API_URL
    names then shows every stage as cached.

    Example: rrlhf run --set ppo.kl_weight=0.05

    Example: rrlhf run --until ensemble
    """
    run_flow(profile, overrides(set_), _part(from_, until, only, force), as_json, take_aliases)


def plan(
    profile: Profile = "default",
    set_: Set = None,
    from_: From = None,
    until: Until = None,
    only: Only = None,
    force: Force = None,
    memory: Memory = False,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Show what a run would do, and why, without running anything.

    run: will compute. reuse: is there. restore: will be brought back from a shared store, MLflow or DVC. upstream: an
    input will run, and its result decides. skip: left out by --from, --until or --only, and not up to date.

    Example: rrlhf plan --set ppo.kl_weight=0.05 -v

    Example: rrlhf plan --memory --set model.gradient_checkpointing=true
    """
    from rrlhf.pipeline.plan import total
    from rrlhf.tools.running.uptodate import unregistered

    project = _project(profile, changed := overrides(set_))
    if memory:
        _print_memory(project, changed, as_json)
        return
    planned = project.plan(_part(from_, until, only, force))
    if as_json:
        print(json.dumps([one._asdict() for one in planned], indent=1))
        return
    for note in project.notes:
        print(f"note: {note}")
    width = max(len(one.node) for one in planned)
    for one in planned:
        print(_line(one, width, verbose))
    if expected := total(planned):
        print(expected)
    if waiting := unregistered(project, planned):
        print(f"to be registered in MLflow: {', '.join(waiting)}")


def why(
    stage: Annotated[str, typer.Argument(help="A node, such as ppo-robust, or all of one kind: ppo, member.")],
    profile: Profile = "default",
    set_: Set = None,
) -> None:
    """Say why a stage would run, back to its first causes, or where its result is.

    Example: rrlhf why evaluate --set sft.epochs=3
    """
    project = _project(profile, overrides(set_))
    nodes, planned = _matching(stage, project), project.plan()
    for node in nodes:
        print("\n".join(_explained(project, planned, node)))


def status(as_json: AsJson = False) -> None:
    """Show every profile's state and last run, what runs now, what was interrupted, and the disk used."""
    from rrlhf.tools.running.status import overview, told

    found = overview(Path.cwd())
    if as_json:
        print(json.dumps(found, indent=1))
    else:
        print("\n".join(told(found)))


def accept(
    stages: Annotated[
        Names, typer.Argument(metavar="STAGE", help="Nodes, such as ppo-robust, or all of one kind; left out: all.")
    ] = None,
    *,
    because: Annotated[str, typer.Option(help="Why the change of the code changes no result; it stays on record.")],
    verify: Annotated[bool, typer.Option("--verify", help="Compute each again first, and compare the bits.")] = False,
    profile: Profile = "default",
    set_: Set = None,
) -> None:
    """Take results of other code for what the present code would make, so that an upgrade computes nothing again.

    Only results that differ in code alone are taken; a plan, the card and the audit say so afterwards.

    Example: rrlhf accept sft --because "a message reworded"

    Example: rrlhf accept --because "upgrade to 0.9, its notes say that no number changes"
    """
    from rrlhf.pipeline.accept import accept as accepting

    project = _project(profile, overrides(set_))
    these = [node for stage in stages for node in _matching(stage, project)] if stages else project.nodes
    again = ", computed again with the same bits" if verify else ""
    for node, old in accepting(project, these, because, verify=verify):
        print(f"{node}  accepted from {old[:12]}{again}")


def relocate() -> None:
    """Have MLflow's database of a folder that was moved or copied name the files that are here now.

    Versions, aliases and the evidence of promotions stay as they are; the database as it was is kept beside it. A
    database of MLFLOW_TRACKING_URI is left alone.
    """
    from rrlhf.pipeline.tracking.server import relocate as move

    print(move(Path.cwd()))


def sync() -> None:
    """Tell the tracking server of the runs that ended while it was away: every number, model and alias, in order.

    A run does this by itself before it registers its own.
    """
    from rrlhf.pipeline.tracking.unsynced import sync as tell

    for line in tell(Path.cwd()):
        print(line)
    print("the tracking server knows of every run")


def report(profile: Profile = "default", set_: Set = None) -> None:
    """Write the HTML report of a finished run again, and print its path."""
    from rrlhf.tools.running.uptodate import stamp_file

    changed = overrides(set_)
    project = _project(profile, changed)
    if left := [one.node for one in project.plan() if one.action != "reuse"]:
        end(FAILED, f"not up to date: {', '.join(left)}; `rrlhf run` with the same options comes first")
    stamp_file(project).unlink(missing_ok=True)
    run_flow(profile, changed)


def run_flow(
    profile: str,
    overrides: dict[str, Json],
    part: Part | None = None,
    as_json: bool = False,
    take_aliases: bool = False,
) -> None:
    """Run the flow in this process; with `as_json`, stdout holds its result and nothing else.

    With nothing to do, its result is told without the flow; a server that was named is told all the same.
    """
    from rrlhf.pipeline.check import check_judge
    from rrlhf.pipeline.decide import Part
    from rrlhf.pipeline.plan import room, total
    from rrlhf.progress import say
    from rrlhf.tools.running.status import noted
    from rrlhf.tools.running.uptodate import nothing_to_do, show
    from rrlhf.tools.serving import started

    part = part or Part()
    with redirect_stdout(sys.stderr) if as_json else nullcontext():
        project = _project(profile, overrides, take_aliases)
        planned = project.plan(part)
        project.check_keys(planned)
        check_judge(project.params.evaluate.judge, planned)  # again in the flow, which may be started without this
        done = None if "PREFECT_API_URL" in os.environ else nothing_to_do(project, planned)
        if done:
            with noted(project.root, profile, overrides, part):
                show(project, done.artifacts)
            say("nothing to do: every stage is up to date and registered")
            result = done.result
        else:
            from httpx import TransportError

            say(total(planned) or "nothing to compute; what is here is registered and reported")
            flow = started(project.root, project.params.tracking.experiment, "pipeline", room(planned))
            asked = {name: [*names] for name, names in part._asdict().items() if names}
            try:
                result = flow(profile=profile, overrides=overrides, part=asked or None, take_aliases=take_aliases)
            except TransportError as error:  # of Prefect's client, which has tried for minutes
                why = f"Prefect's server answers no more ({error})"
                print(f"{why}: what is finished stays, and the same command goes on", file=sys.stderr, flush=True)
                os._exit(FAILED)  # the client would try as long again for every event that it has not sent
    if as_json:
        print(json.dumps(result, indent=1))


def _part(from_: Names, until: Names, only: Names, force: Names) -> Part:
    from rrlhf.pipeline.decide import Part

    return Part(tuple(from_ or ()), tuple(until or ()), tuple(only or ()), tuple(force or ()))


def _project(profile: str, overrides: dict[str, Json], take_aliases: bool = False) -> Project:
    from rrlhf.pipeline.check import check_sources
    from rrlhf.pipeline.plan import Project

    project = Project.opened(Path.cwd(), profile, overrides, take_aliases=take_aliases)
    check_sources(project)
    return project


def _print_memory(project: Project, changed: dict[str, Json], as_json: bool) -> None:
    from rrlhf.tools.running import memory

    found = memory.by_node(project)
    stage = {node.name: node.stage for node in project.nodes}[memory.largest(found)]
    less = dict(sorted(memory.cheaper(project, stage, changed), key=lambda each: each[1]))
    if as_json:
        print(json.dumps(memory.as_json(found, less), indent=1))
    else:
        print("\n".join(memory.lines(found, less, project.params.launch)))


def _matching(stage: str, project: Project) -> list[Node]:
    from rrlhf.pipeline.decide import matching, unknown

    return matching(stage, project.nodes) or end(USAGE, unknown(stage, project.nodes))


def _explained(project: Project, planned: Sequence[Planned], node: Node) -> Iterator[str]:
    """Yield lines on what would happen to a node and why; `planned` is the whole plan."""
    from rrlhf.pipeline.decide import Part, chosen

    one = next(one for one in planned if one.node == node.name)
    if one.action == "reuse":
        here = project.store.find(node.stage, str(one.key))
        yield f"{node.name} is up to date: {here.made if here else one.key}"
    elif one.action == "upstream":
        yield f"{node.name} depends on what will run before it; with equal results it is not run:"
        above = chosen(Part(until=(node.name,)), project.nodes).allowed
        yield from (
            f"  {each.node}: {'; '.join(each.reasons)}"
            for each in planned
            if each.node in above and each.action == "run"
        )
    else:
        yield f"{node.name} will {'be restored' if one.action == 'restore' else 'run'}:"
        yield from (f"  {reason}" for reason in one.reasons)
        document = project.document(node, {each.node: each.digest for each in planned if each.digest})
        _, closest = project.closest(node, document)
        if closest and one.action == "run" and one.reasons != ["artifact missing"]:
            yield f"compared with the closest earlier result: {closest.key[:12]}, made {closest.manifest['created']}"


def _line(one: Planned, width: int, verbose: bool) -> str:
    from rrlhf.progress import in_words

    took = f"  (took {in_words(one.seconds)} last time)" if one.seconds is not None else ""
    reasons = one.reasons if verbose else one.reasons[:1]
    more = f" and {len(one.reasons) - len(reasons)} more" if len(one.reasons) > len(reasons) else ""
    return f"{one.node:{width}}  {one.action:8}  {'; '.join(reasons)}{more}{took}".rstrip()
