"""One run of the pipeline: what its nodes need, make, find and register, as tasks that Prefect shows."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import cached_property
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas import State
from prefect.futures import PrefectFuture
from prefect.states import Completed
from prefect.task_runners import TaskRunner

from rrlhf.environment import check_room, find_root, set_environment
from rrlhf.execution.pages import Pages
from rrlhf.execution.runners import runner_of, waited
from rrlhf.files import write
from rrlhf.judging.evaluation import read_evaluation
from rrlhf.pipeline import dvc
from rrlhf.pipeline.artifacts import Artifact, git_commit
from rrlhf.pipeline.cards import about, cut_in_words
from rrlhf.pipeline.check import check_columns, check_judge, check_sources
from rrlhf.pipeline.decide import Chosen, Part, chosen
from rrlhf.pipeline.graph import DATA, Node
from rrlhf.pipeline.launch import execute
from rrlhf.pipeline.params import run_name
from rrlhf.pipeline.plan import Planned, Project, room
from rrlhf.pipeline.produce import carry_out
from rrlhf.pipeline.stages import kind_of, telling
from rrlhf.pipeline.store import Store
from rrlhf.pipeline.tracking.server import (
    AwayError,
    TrackingError,
    address,
    check_answer,
    database,
    mlflow_pages,
    version_page,
)
from rrlhf.pipeline.tracking.tracker import Tracker
from rrlhf.pipeline.tracking.unsynced import Made, Unsynced, note, sync
from rrlhf.policy.health import DivergedError
from rrlhf.progress import in_words, say
from rrlhf.redact import without_secrets
from rrlhf.stopping import STOPPING, check_stop, stop_between_steps
from rrlhf.tools.running.status import noted
from rrlhf.tools.running.uptodate import note_report, nothing_to_do, report_file, show, trainings_of, write_numbers
from rrlhf.types import Dataset

Answer = TypeVar("Answer")

MOST_REASONS = 3  # of a stage that are told in Prefect's pages


class Run:
    """One run of the flow: the project, where it is tracked, and what it has made or found so far."""

    def __init__(self, project: Project, wanted: Chosen, made: list[str], pages: Pages, name: str) -> None:
        self.project, self.wanted, self.pages, self.name = project, wanted, pages, name
        self.tracking_id = ""  # of its run in MLflow; "" with nothing to do, or while the server is away
        self.unsynced = ""  # why the server does not know all of it
        self.artifacts: dict[str, Artifact] = {}
        self.made = made  # nodes that computed; all others were there already
        self.moved: list[str] = []  # aliases, in words
        self.versions: dict[str, str] = {}  # of models, by node: "rrlhf-policy/3"
        self.report: str | None = None  # path of the HTML file, where there is a comparison
        self.files: list[str] = []  # that were written about it, in the project, for its run in MLflow
        self.runner: TaskRunner[Any] | None = None  # None: the flow's

    def __getstate__(self) -> dict[str, Any]:  # as a cluster's worker gets it
        return {name: value for name, value in vars(self).items() if name not in {"tracker", "runner"}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        set_environment(self.project.root)

    @cached_property
    def tracker(self) -> Tracker:
        """MLflow, imported and asked only when it is needed: that takes seconds."""
        return Tracker(self.project.root, self.project.params.tracking.experiment)

    def tell(self, ask: Callable[[Tracker], Answer]) -> Answer | None:
        """Tell MLflow something, or ask it; None when its server does not answer, which is noted and ends nothing."""
        root = self.project.root
        if self.unsynced:
            return None
        try:
            check_answer(address(root))
            return ask(self.tracker)
        except TrackingError as error:
            if database(root):
                raise  # a file of this machine comes back when it is mended
            self.unsynced = str(error)
            return None

    @property
    def digests(self) -> dict[str, str]:
        """Content digest of every node that is done."""
        return {name: artifact.digest for name, artifact in self.artifacts.items()}

    @property
    def summary(self) -> dict[str, Any]:
        """What ran, the folder of every result, and the report."""
        root = self.project.root
        folders = {name: str(artifact.path.relative_to(root)) for name, artifact in self.artifacts.items()}
        return {"ran": self.made, "folders": folders, "report": self.report}

    def for_later(self) -> Unsynced:
        """What MLflow is to know of it."""
        project, found = self.project, self.artifacts
        made = [
            Made(node.stage, found[node.name].key, project.aliases_of(node))
            for node in project.nodes
            if node.name in found
        ]
        settings, experiment = project.params.model_dump(), project.params.tracking.experiment
        commit = git_commit(project.root)
        return Unsynced(experiment, project.profile, self.name, settings, commit, self.tracking_id, made, self.files)

    def dataset_of(self, node: Node) -> Dataset | None:
        """Return the data set that a node reads itself."""
        return self.artifacts[DATA].dataset if DATA in node.inputs.values() else None


class Started(NamedTuple):
    """A node whose task was handed to the task runner."""

    node: Node
    planned: Planned
    run: Run
    future: PrefectFuture[State[None]]


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


@contextmanager
def tracked(run: Run, group: Run | None = None) -> Iterator[None]:
    """Open the run's run in MLflow, below that of a group, and close it with how the flow ended.

    While the server is away, what it is to know of a run that finished is noted. Raises TrackingError when it refuses.
    """
    try:
        begin(run, group)
    except AwayError as error:
        if group is None:
            say(f"{error}\nthe run goes on without it")
    try:
        yield
    except BaseException as error:
        with suppress(TrackingError):  # it may have the same cause, and that is told
            close(run, "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
        raise
    close(run, "FINISHED")
    if run.unsynced or not run.tracking_id:
        note(run.project.root, run.for_later())
        if group is None:
            why = run.unsynced or "the tracking server was away when it began"
            say(f"complete, unsynced: {why}\n`rrlhf sync`, or the next run, tells the server")


def close(run: Run, status: str) -> None:
    """Close a run's run in MLflow."""
    if run.tracking_id:
        run.tell(lambda tracker: tracker.finish_flow(run.tracking_id, status))


def begin(run: Run, group: Run | None = None) -> None:
    """Open a run's run in MLflow, below that of a group."""
    if group and group.tracking_id:
        run.tracker = group.tracker
    project, parent = run.project, group.tracking_id if group else None
    settings, commit = project.params.model_dump(), git_commit(project.root)
    run.tracking_id = run.tracker.start_flow(project.profile, settings, commit, name=run.name, parent=parent)


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


def register_all(run: Run) -> str | None:
    """Make sure that MLflow knows every model, those of earlier runs first; return the path of the report, if any."""

    def everything(tracker: Tracker) -> None:
        for told in sync(run.project.root):
            say(told)
        if not run.tracking_id:
            begin(run)
        for node in run.project.nodes:
            if node.name in run.artifacts and node.name != DATA:
                register.with_options(task_run_name=f"register-{node.name}")(node, run)

    run.unsynced = ""  # the server may be back
    run.tell(everything)
    stay = "aliases stay with the settings as they stand; --take-aliases gives them to the models of this run"
    for line in run.moved or ([] if run.project.takes_aliases else [stay]):
        print(line, flush=True)
    return report(run) if "evaluate" in run.artifacts else None


@task(cache_policy=NO_CACHE, persist_result=False)
def register(node: Node, run: Run) -> State[None]:
    """Make sure that MLflow knows an artifact, its metrics and its inputs; never trains."""
    project, artifact = run.project, run.artifacts[node.name]
    aliases, dataset = project.aliases_of(node), run.dataset_of(node)
    made = run.tracker.register(artifact, dataset, profile=project.profile, aliases=aliases, parent=run.tracking_id)
    if made is None:
        return Completed(message="its run and files")
    run.moved += made.moved
    run.versions[node.name] = f"{made.name}/{made.version}"
    how = "registered as" if made.created else "is registered as"
    return Completed(message="; ".join([f"{how} {made.name} v{made.version}", *made.moved]))


@task(task_run_name="report", cache_policy=NO_CACHE, persist_result=False)
def report(run: Run) -> str:
    """Write the HTML report, tell of the comparison, and return the report's path."""
    from rrlhf.tools.lineage.lookup import graph_of
    from rrlhf.tools.reporting.report import render

    project, trained = run.project, trainings_of(run.project, run.artifacts)
    evaluation = read_evaluation(run.artifacts["evaluate"].path)
    ancestry = graph_of(run.tell(Tracker.versions) or [], project.profile, project.store.products())
    candidate = ancestry.find(candidate_of(run).key)
    html = report_file(project)
    text = render(
        evaluation,
        profile=project.profile,
        params=project.params.model_dump(),
        lineage=(ancestry, candidate),
        facts=_facts(run),
        trained=trained,
    )
    write(html, text)
    write_numbers(project, evaluation, trained)
    run.files = [str(html.relative_to(project.root))]
    page = run.tell(lambda tracker: tracker.log_report(run.tracking_id, html))
    note_report(project, run.artifacts)
    run.pages.lineage(ancestry, candidate, mlflow_pages(project.root))
    run.pages.report(page or html.as_uri(), html.name)
    return told(run)


def candidate_of(run: Run) -> Artifact:
    """Return the policy of the arm that the settings choose, which may not have the alias."""
    chosen = run.project.params.tracking.candidate
    return next(run.artifacts[node.name] for node in run.project.nodes if node.arm == chosen)


def told(run: Run) -> str:
    """Print the comparison, show it in Prefect's pages, and return the report's path."""
    shown = show(run.project, run.artifacts)
    mlflow = mlflow_pages(run.project.root)
    arms = {node.name: node.arm or node.name for node in run.project.nodes}
    links = {arms[node]: version_page(mlflow, name) for node, name in run.versions.items() if mlflow}
    run.pages.comparison(*shown, links)
    return shown.report


def _facts(run: Run) -> dict[str, str]:
    """Return what a reader of the report wants to know of the run's circumstances."""
    last = run.artifacts["evaluate"].manifest
    times = {f"seconds for {name}": f"{item.manifest['seconds']:g}" for name, item in run.artifacts.items()}
    return {
        "git commit": str(last["git_commit"]),
        "data set": run.artifacts[DATA].digest,
        "made": last["created"],
        "hardware": ", ".join(f"{name} {value}" for name, value in last["hardware"].items()),
        **{f"cut in {name}": told for name, item in run.artifacts.items() if (told := cut_in_words(item.metrics))},
        **times,
    }
