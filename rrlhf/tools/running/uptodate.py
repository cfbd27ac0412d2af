"""How a run ends: what is told and remembered of it. A run in which nothing is to be done is found out and told alike.

That goes without Prefect, MLflow or torch. Whatever cannot be known for certain makes it an ordinary run.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from rrlhf.files import write, write_if_new
from rrlhf.judging.evaluation import Evaluation, read_evaluation
from rrlhf.memo import sha256
from rrlhf.pipeline import dvc
from rrlhf.pipeline.artifacts import Artifact
from rrlhf.pipeline.graph import DATA
from rrlhf.pipeline.keys import key_digest
from rrlhf.pipeline.plan import Planned, Project
from rrlhf.pipeline.stages import model_name
from rrlhf.pipeline.tracking.server import database
from rrlhf.pipeline.tracking.tracker import Registration, registrations
from rrlhf.tools.reporting import numbers
from rrlhf.tools.reporting.verdict import Training, training
from rrlhf.types import Json

Registered = dict[str, Registration | None]  # by node


class Done(NamedTuple):
    """A run with nothing to do: what it returns, and the artifacts of which it shows the comparison."""

    result: Json
    artifacts: dict[str, Artifact]
    versions: dict[str, str]  # of models, by node: "rrlhf-policy/3"


class Shown(NamedTuple):
    """What a person is told at the end of a run."""

    evaluation: Evaluation
    sentences: list[str]  # what the comparison says
    report: str  # the path of the HTML file, in the project


def nothing_to_do(project: Project, planned: list[Planned]) -> Done | None:
    """Return what a run would, if all of it is there, unchanged, registered and reported; else None."""
    if any(one.action != "reuse" for one in planned):
        return None
    artifacts = _artifacts(project, planned)
    stamp, noted = _stamp(project, artifacts), stamp_file(project)
    if not stamp or not noted.is_file() or noted.read_text(encoding="utf-8") != stamp:
        return None
    folders: Json = {name: str(artifact.path.relative_to(project.root)) for name, artifact in artifacts.items()}
    report = str(report_file(project).relative_to(project.root))
    known = registered(project, artifacts) or {}
    versions = {name: f"{one.name}/{one.version}" for name, one in known.items() if one and one.name}
    return Done({"ran": [], "folders": folders, "report": report}, artifacts, versions)


def unregistered(project: Project, planned: list[Planned]) -> list[str]:
    """Return the nodes whose results are here and not all registered, as far as that can be told without a server."""
    found = _artifacts(project, [one for one in planned if one.action == "reuse"])
    return [name for name, registration in (registered(project, found) or {}).items() if registration is None]


def registered(project: Project, artifacts: Mapping[str, Artifact]) -> Registered | None:
    """Return how every model is registered, None where something is left to do; None when that cannot be told."""
    if database(project.root) is None:
        return None  # only the server can tell
    experiment, found = project.params.tracking.experiment, Registered()
    known = registrations(project.root, experiment)
    for node in project.nodes:
        artifact = artifacts.get(node.name)
        if artifact is None or node.name == DATA:
            continue
        one = known.get((artifact.key, model_name(artifact.stage, project.profile)))
        whole = one and one.digest == artifact.digest and one.complete
        found[node.name] = one if one and whole and {*project.aliases_of(node)} <= {*one.aliases} else None
    return found


def report_file(project: Project) -> Path:
    """Return where a profile's report is written."""
    return project.root / "reports" / f"{project.profile}.html"


def numbers_files(project: Project) -> dict[str, Path]:
    """Return where the numbers lie that git keeps, for `dvc metrics diff` and `dvc plots diff`.

    Those of an override (--set) would stand beside settings that did not give them, and are not kept.
    """
    folder = project.root / "reports" / project.profile
    return {name: folder / name for name in numbers.FILES} if project.as_filed else {}


def write_numbers(project: Project, evaluation: Evaluation, trainings: Mapping[str, Training]) -> None:
    """Write the files that commits are compared by, if a profile's own settings gave these numbers."""
    for name, path in numbers_files(project).items():
        write_if_new(path, numbers.texts(evaluation, trainings)[name])


def changed_numbers(project: Project) -> list[Path]:
    """Return those of these files that do not say what the results of the present settings do, if all are there."""
    artifacts = _artifacts(project, project.plan())
    files = {name: path for name, path in numbers_files(project).items() if path.is_file()}
    if not files or {node.name for node in project.nodes} - artifacts.keys():
        return []
    expected = numbers.texts(read_evaluation(artifacts["evaluate"].path), trainings_of(project, artifacts))
    return [path for name, path in files.items() if path.read_bytes() != expected[name].encode()]


def trainings_of(project: Project, artifacts: Mapping[str, Artifact]) -> dict[str, Training]:
    """Return what is told of every arm's training, by arm."""
    told = {node.arm: training(artifacts[node.name]) for node in project.nodes if node.arm}
    return {arm: seen for arm, seen in told.items() if seen}


def show(project: Project, artifacts: Mapping[str, Artifact]) -> Shown:
    """Print the comparison, what it says, and the report's path; return them."""
    from rrlhf.tools.reporting import tables
    from rrlhf.tools.reporting.comparison import samples, table
    from rrlhf.tools.reporting.verdict import verdict

    evaluation = read_evaluation(artifacts["evaluate"].path)
    sentences = verdict(evaluation, trainings_of(project, artifacts))
    shown = Shown(evaluation, sentences, str(report_file(project).relative_to(project.root)))
    tables.show(table(evaluation), samples(evaluation), *sentences)
    print(f"\nreport: {shown.report}", flush=True)
    return shown


def note_report(project: Project, artifacts: Mapping[str, Artifact]) -> None:
    """Remember what the report that was just written is made of."""
    write(stamp_file(project), _stamp(project, artifacts))


def stamp_file(project: Project) -> Path:
    """Return where it is noted what a profile's report was made of; without it the report is written again."""
    return project.root / ".rrlhf" / "reports" / f"{project.profile}.sha256"


def _artifacts(project: Project, planned: list[Planned]) -> dict[str, Artifact]:
    """Return the artifacts of a plan, by node."""
    stages = {node.name: node.stage for node in project.nodes}
    found = {one.node: project.store.find(stages[one.node], one.key) for one in planned if one.key}
    return {name: artifact for name, artifact in found.items() if artifact}


def _stamp(project: Project, artifacts: Mapping[str, Artifact]) -> str:
    """Return a digest of the report and of all that it shows; "" when something is not there or not registered."""
    known = registered(project, artifacts)
    files = [report_file(project), dvc.pointer(artifacts[DATA].path), *numbers_files(project).values()]
    if known is None or None in known.values() or not all(path.is_file() for path in files):
        return ""
    return key_digest(
        {
            "files": [sha256(path) for path in files],
            "params": project.params.model_dump(),
            "artifacts": {name: artifact.key for name, artifact in artifacts.items()},
            "registered": known,
            "shared": project.shared.address if project.shared else "",
        }
    )
