"""A run's nodes as tasks that Prefect shows: each is found, brought back or computed, some of them side by side."""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import IO, Any, NamedTuple

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas import State
from prefect.futures import PrefectFuture
from prefect.states import Completed
from prefect.task_runners import TaskRunner

from rrlhf.execution.runners import waited
from rrlhf.execution.state import Run
from rrlhf.pipeline import dvc
from rrlhf.pipeline.artifacts import Artifact
from rrlhf.pipeline.cards import about
from rrlhf.pipeline.graph import DATA, Node
from rrlhf.pipeline.launch import execute
from rrlhf.pipeline.plan import Planned
from rrlhf.pipeline.produce import carry_out
from rrlhf.pipeline.stages import telling
from rrlhf.pipeline.store import Store
from rrlhf.policy.health import DivergedError
from rrlhf.progress import in_words
from rrlhf.redact import without_secrets
from rrlhf.stopping import check_stop

MOST_REASONS = 3  # of a stage that are told in Prefect's pages


class Started(NamedTuple):
    """A node whose task was handed to the task runner."""

    node: Node
    planned: Planned
    run: Run
    future: PrefectFuture[State[None]]


def start(node: Node, run: Run, beside: int) -> Started | None:
    """Decide for a node, and hand it to the task runner; None when it is left out of this run.

    Raises TamperedError when its artifact is there and was changed, FileNotFoundError when it lacks an input.
    """
    planned = run.project.decide(node, run.digests, run.wanted)
    if planned.action == "skip":
        return None
    if planned.action == "upstream":
        raise FileNotFoundError(f"{node.name} comes {planned.reasons[0]}, which this run leaves out")
    task = have.with_options(task_run_name=node.name)
    told: dict[str, Any] = {"node": node, "planned": planned, "run": run, "beside": beside}
    return Started(node, planned, run, run.runner.submit(task, told) if run.runner else task.submit(**told))


def finish(started: Iterable[Started | None], run: Run) -> None:
    """Wait for all, so that one failure does not lose the others' results, and then take every result."""
    diverged: list[str] = []
    for one in ended(started, run.runner):
        try:
            one.future.result()
        except DivergedError as error:
            diverged.append(f"{one.node.name} {error}")
            continue
        take(one, run)
    if diverged:
        raise DivergedError("\n".join(diverged))


def ended(started: Iterable[Started | None], runner: TaskRunner[Any] | None) -> list[Started]:
    """Return what was not left out once all of it has ended, having noted for its run what was computed."""
    everything = [one for one in started if one]
    waited([one.future for one in everything], runner)
    for one in everything:
        if one.future.state.name == "Completed":  # it was neither found nor failed
            one.run.made.append(one.node.name)
    return everything


def take(one: Started, run: Run) -> None:
    """Add a finished result to a run; one that could not be brought back, and may not be made, is left out."""
    artifact = run.project.store.find(one.node.stage, str(one.planned.key))
    if artifact:
        run.artifacts[one.node.name] = artifact


@task(cache_policy=NO_CACHE, persist_result=False)
def have(node: Node, planned: Planned, run: Run, beside: int) -> State[None]:
    """Carry out what was decided for a node: reuse its result, bring it back, or compute it, and compare if forced.

    A shared store keeps copies of all, DVC those of data sets, MLflow those of all others.
    """
    check_stop()  # an arm may start after Ctrl-C
    project, is_data = run.project, node.name == DATA

    def compute(staged: Path, lock: IO[str]) -> None:
        document = project.document(node, run.digests)
        inputs = {argument: run.artifacts[name].path for argument, name in node.inputs.items()}
        launch, max_cut = project.params.launch, 1.0 if is_data else project.params.limits.max_cut  # data cuts nothing
        with without_secrets():  # the user's reward functions run
            execute(document, inputs=inputs, out=staged, launch=launch, lock=lock, beside=beside, max_cut=max_cut)

    def recorded(staged: Path) -> AbstractContextManager[None]:
        if is_data or not run.tracking_id:
            return nullcontext()
        key = str(planned.key)
        return run.tracker.stage_run(run.tracking_id, node, key, staged, project.store.folder(node.stage, key))

    def bring_back(store: Store, stage: str, key: str) -> Artifact | None:
        if project.shared and (found := project.shared.fetch(store, stage, key)):
            return found
        if is_data:
            return dvc.bring_back(store, stage, key)
        return run.tell(lambda tracker: tracker.bring_back(store, stage, key))

    artifact, computed = carry_out(
        project,
        node,
        planned,
        run.wanted,
        run.digests,
        compute,
        bring_back=bring_back,
        recorded=recorded,
        dataset={} if is_data else about(run.artifacts[DATA].dataset, project.params.prepare),
        input_keys={argument: run.artifacts[name].key for argument, name in node.inputs.items()},
    )
    if artifact is None:
        return Completed(name="Cached", message=f"left out: {planned.reasons[0]}, in vain")
    if is_data and (computed or not dvc.pointer(artifact.path).exists()):
        dvc.keep(project.root, artifact.path)
    numbers = telling(node.stage, artifact.metrics)
    if computed:
        why = "".join(f"{reason}; " for reason in planned.reasons[:MOST_REASONS])
        return Completed(message=f"{why}{numbers or 'made'} in {in_words(artifact.manifest['seconds'])}")
    made = f"made {artifact.manifest['created']}"
    return Completed(name="Cached", message=f"{numbers}, {made}" if numbers else made)
