"""One run of the pipeline, as flows/pipeline.py tells it: opened and checked, made stage by stage, told at its end."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from rrlhf.environment import check_room, find_root, set_environment
from rrlhf.execution.closing import register_all, told
from rrlhf.execution.nodes import finish, start
from rrlhf.execution.pages import Pages
from rrlhf.execution.runners import runner_of
from rrlhf.execution.state import Run, tracked
from rrlhf.pipeline.check import check_columns, check_judge, check_sources
from rrlhf.pipeline.decide import Part, chosen
from rrlhf.pipeline.graph import DATA
from rrlhf.pipeline.params import run_name
from rrlhf.pipeline.plan import Project, room
from rrlhf.pipeline.stages import kind_of
from rrlhf.progress import say
from rrlhf.redact import without_secrets
from rrlhf.stopping import STOPPING, stop_between_steps
from rrlhf.tools.running.status import noted
from rrlhf.tools.running.uptodate import nothing_to_do


@contextmanager
def running(
    profile: str, overrides: dict[str, Any] | None, part: Mapping[str, list[str]] | None, take_aliases: bool
) -> Iterator[Run]:
    """Open a run: everything is checked and planned before it yields; what was made is registered and told after it.

    With nothing to do, MLflow gets no further run.
    """
    stop_between_steps(STOPPING)  # here, since Prefect's own handler of SIGTERM ends a step in its middle
    root = find_root(Path.cwd())
    set_environment(root)
    project, pages = Project.opened(root, profile, overrides, take_aliases=take_aliases), Pages(profile)
    asked = Part(**{name: tuple(names) for name, names in (part or {}).items()})
    with without_secrets(), noted(root, profile, overrides or {}, asked) as ran:
        check_sources(project, fetch=True)
        for remark in project.notes:
            say(f"note: {remark}")
        planned = project.plan(asked)  # raises when a part lacks what it is built on
        project.check_keys(planned)
        check_judge(project.params.evaluate.judge, planned)
        check_room(root, room(planned))
        pages.plan(planned)
        done = nothing_to_do(project, planned)
        run = Run(project, chosen(asked, project.nodes), ran, pages, run_name(profile, overrides))
        run.versions = done.versions if done else {}
        with runner_of(project.params.launch) as run.runner, nullcontext() if done else tracked(run):
            yield run
            run.report = told(run) if done else register_all(run)


def make(kind: str, run: Run) -> None:
    """Have the results of all nodes of a kind, side by side where there are several: made, or found."""
    nodes = [node for node in run.project.nodes if kind_of(node.stage) == kind]
    at_once = run.project.params.launch.arms_at_once
    for together in (nodes[i : i + at_once] for i in range(0, len(nodes), at_once)):
        finish([start(node, run, beside=len(together) - 1) for node in together], run)
        run.pages.advance(run.digests)
    if kind == "prepare" and DATA in run.artifacts:
        check_columns(run.project, run.artifacts[DATA].path)
