"""The run in which nothing is to be done: found out, and told like any other, without Prefect, MLflow or torch.

Whatever cannot be known for certain makes it an ordinary run.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from rrlhf.files import write
from rrlhf.judging.evaluation import Evaluation, read_evaluation
from rrlhf.memo import sha256
from rrlhf.pipeline import dvc
from rrlhf.pipeline.artifacts import Artifact
from rrlhf.pipeline.graph import DATA
from rrlhf.pipeline.keys import key_digest
from rrlhf.pipeline.plan import Planned, Project
from rrlhf.pipeline.stages import model_name
from rrlhf.pipeline.tracking.registry import Registration, registrations
from rrlhf.pipeline.tracking.server import database
from rrlhf.tools.reporting.trainings import Training, health, training
from rrlhf.tools.running.numbers import numbers_digests
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
    sentences: list[str]  # what the comparison says, and what health saw
    report: str  # the path of the HTML file, in the project


def nothing_to_do(project: Project, planned: list[Planned]) -> Done | None:
    """Return what a run would, if all of it is there, unchanged, registered and reported; else None."""
    if any(one.action != "reuse" for one in planned):
        return None
    artifacts = _artifacts(project, planned)
    known, noted = registered(project, artifacts), _stamp_file(project)
    stamp = _stamp(project, artifacts, known)
    if known is None or stamp is None or not noted.is_file() or noted.read_text(encoding="utf-8") != stamp:
        return None
    folders: Json = {name: str(artifact.path.relative_to(project.root)) for name, artifact in artifacts.items()}
    report = str(report_file(project).relative_to(project.root))
    names = {name: model_name(artifacts[name].stage, project.profile) for name in known}
    versions = {name: f"{names[name]}/{one.version}" for name, one in known.items() if one}
    return Done({"ran": [], "folders": folders, "report": report}, artifacts, versions)


def unregistered(project: Project, planned: list[Planned]) -> list[str]:
    """Return the nodes whose results are here and not all registered, as far as that can be told without a server."""
    found = _artifacts(project, [one for one in planned if one.action == "reuse"])
    return [name for name, registration in (registered(project, found) or {}).items() if registration is None]


def registered(project: Project, artifacts: Mapping[str, Artifact]) -> Registered | None:
    """Return how every model is registered, None where something is left to do; None when that cannot be told."""
    if database(project.root) is None:
        return None  # only the server can tell
    nodes = {node.name: node for node in project.nodes}
    models = {name: artifact for name, artifact in artifacts.items() if name != DATA}
    known = registrations(
        project.root, project.params.tracking.experiment, [artifact.key for artifact in models.values()]
    )
    found: Registered = {}
    for name, artifact in models.items():
        one = known.get((artifact.key, model_name(artifact.stage, project.profile)))
        whole = one and one.digest == artifact.digest and one.complete
        found[name] = one if one and whole and {*project.aliases_of(nodes[name])} <= {*one.aliases} else None
    return found


def report_file(project: Project) -> Path:
    """Return where a profile's report is written."""
    return project.root / "reports" / f"{project.profile}.html"


def trainings_of(project: Project, artifacts: Mapping[str, Artifact]) -> dict[str, Training]:
    """Return what is told of every arm's training, by arm."""
    told = {node.arm: training(artifacts[node.name]) for node in project.nodes if node.arm}
    return {arm: seen for arm, seen in told.items() if seen}


def show(project: Project, artifacts: Mapping[str, Artifact]) -> Shown:
    """Print the comparison, what it says, what health saw, and the report's path; return them."""
    from rich.console import Console

    from rrlhf.tools.reporting import tables
    from rrlhf.tools.reporting.comparison import samples, terminal_table
    from rrlhf.tools.reporting.verdict import verdict

    evaluation = read_evaluation(artifacts["evaluate"].path)
    sentences = [*filter(None, [*verdict(evaluation), health(trainings_of(project, artifacts))])]
    shown = Shown(evaluation, sentences, str(report_file(project).relative_to(project.root)))
    console = Console(file=sys.stdout)
    tables.show(terminal_table(evaluation), console)
    console.print(samples(evaluation))
    for sentence in sentences:
        console.print(sentence, highlight=False, markup=False)
    console.print(f"\nreport: {shown.report}", highlight=False, markup=False, soft_wrap=True)
    return shown


def note_report(project: Project, artifacts: Mapping[str, Artifact]) -> None:
    """Remember what the report that was just written is made of."""
    write(_stamp_file(project), _stamp(project, artifacts, registered(project, artifacts)) or "")


def _artifacts(project: Project, planned: list[Planned]) -> dict[str, Artifact]:
    """Return the artifacts of a plan, by node."""
    stages = {node.name: node.stage for node in project.nodes}
    found = {one.node: project.store.find(stages[one.node], one.key) for one in planned if one.key}
    return {name: artifact for name, artifact in found.items() if artifact}


def _stamp(project: Project, artifacts: Mapping[str, Artifact], known: Registered | None) -> str | None:
    """Return a digest of the report and of all that it shows; None when something is not there or not registered."""
    html, numbers = report_file(project), numbers_digests(project)
    whole = html.is_file() and numbers is not None and dvc.pointer(artifacts[DATA].path).exists()
    if known is None or not whole or None in known.values():
        return None
    made_by = ("rrlhf.tools.reporting.report", "rrlhf.tools.reporting.numbers", "rrlhf.tools.lineage.load")
    templates = sorted((Path(__file__).parents[2] / "templates").glob("*.j2"))
    shown: dict[str, Any] = {
        "report": sha256(html),
        "params": project.params.model_dump(),
        "artifacts": {name: sha256(artifact.path / "artifact.json") for name, artifact in artifacts.items()},
        "registered": {name: [one.version, one.digest, one.aliases] for name, one in known.items() if one},
        "code": project.modules.closure(*made_by),
        "numbers": numbers,
        "templates": {path.name: sha256(path) for path in templates},
    }
    return key_digest(shown)


def _stamp_file(project: Project) -> Path:
    return project.root / ".rrlhf" / "reports" / f"{project.profile}.sha256"
