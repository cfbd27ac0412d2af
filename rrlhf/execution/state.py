"""A run of the pipeline: the project, what is made or found so far, and its run in MLflow, whose server may be away."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from typing import Any, TypeVar

from prefect.task_runners import TaskRunner

from rrlhf.environment import set_environment
from rrlhf.execution.pages import Pages
from rrlhf.pipeline.artifacts import Artifact, git_commit
from rrlhf.pipeline.decide import Chosen
from rrlhf.pipeline.graph import DATA, Node
from rrlhf.pipeline.plan import Project
from rrlhf.pipeline.tracking.server import AwayError, TrackingError, address, check_answer, database
from rrlhf.pipeline.tracking.tracker import Tracker
from rrlhf.pipeline.tracking.unsynced import Made, Unsynced, note
from rrlhf.progress import say
from rrlhf.types import Dataset

Answer = TypeVar("Answer")


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
