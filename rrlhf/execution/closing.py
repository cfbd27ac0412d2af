"""What follows the nodes of a run: MLflow knows every model, and the report and the comparison are shown."""

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas import State
from prefect.states import Completed

from rrlhf.execution.state import Run, begin
from rrlhf.files import write
from rrlhf.judging.evaluation import read_evaluation
from rrlhf.pipeline.artifacts import Artifact
from rrlhf.pipeline.cards import cut_in_words
from rrlhf.pipeline.graph import DATA, Node
from rrlhf.pipeline.tracking.server import mlflow_pages, version_page
from rrlhf.pipeline.tracking.tracker import Tracker
from rrlhf.pipeline.tracking.unsynced import sync
from rrlhf.progress import say
from rrlhf.tools.running.uptodate import note_report, report_file, show, trainings_of, write_numbers


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
