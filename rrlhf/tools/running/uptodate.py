"""The run in which nothing is to be done: found out, and told like any other, without Prefect, MLflow or torch.

Whatever cannot be known for certain makes it an ordinary run.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from rrlhf.files import write
from rrlhf.judging.evaluation import Evaluation, read_evaluation
from rrlhf.memo import sha256
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
    dataset = project.dataset()
    if dataset is None or len(artifacts) + 1 != len(project.nodes):
        return None
    known = _registered(project, artifacts)
    report_now = _report_of(project, artifacts, known) if known is not None else None
    if known is None or report_now is None or report_now != _noted_report(project):
        return None
    folders = {DATA: dataset.path} | {name: artifact.path for name, artifact in artifacts.items()}
    shown: Json = {name: str(path.relative_to(project.root)) for name, path in folders.items()}
    report = str(report_file(project).relative_to(project.root))
    versions = {
        name: f"{model_name(artifacts[name].stage, project.profile)}/{one.version}" for name, one in known.items()
    }
    return Done({"ran": [], "folders": shown, "report": report}, artifacts, versions)


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
    known = _registered(project, artifacts)
    path = _note_of(project)
    if known is None:
        path.unlink(missing_ok=True)
        return
    write(path, json.dumps(_report_of(project, artifacts, known)))


def _artifacts(project: Project, planned: list[Planned]) -> dict[str, Artifact]:
    """Return the artifacts of a plan, by node."""
    stages = {node.name: node.stage for node in project.nodes}
    found = {one.node: project.store.find(stages[one.node], one.key) for one in planned if one.key}
    return {name: artifact for name, artifact in found.items() if artifact}


def _registered(project: Project, artifacts: Mapping[str, Artifact]) -> dict[str, Registration] | None:
    """Return how every artifact is registered; None when something is left to do there, or cannot be told."""
    known = _known(project, artifacts)
    found = {name: one for name, one in (known or {}).items() if one}
    aliased = all(
        {*project.aliases_of(node)} <= {*found[node.name].aliases} for node in project.nodes if node.name in found
    )
    return found if len(found) == len(artifacts) and aliased else None


def unregistered(project: Project, planned: list[Planned]) -> list[str]:
    """Return the nodes whose results are here and not registered, as far as that can be told without a server."""
    found = _artifacts(project, [one for one in planned if one.action == "reuse"])
    return [name for name, registration in (_known(project, found) or {}).items() if registration is None]


def _known(project: Project, artifacts: Mapping[str, Artifact]) -> dict[str, Registration | None] | None:
    """Return how every artifact is registered, all that belongs to it included; None when that cannot be told."""
    if database(project.root) is None:
        return None  # only the server can tell
    experiment = project.params.tracking.experiment
    known = registrations(project.root, experiment, [artifact.key for artifact in artifacts.values()])
    found: dict[str, Registration | None] = {}
    for name, artifact in artifacts.items():
        one = known.get((artifact.key, model_name(artifact.stage, project.profile)))
        found[name] = one if one and one.digest == artifact.digest and one.complete else None
    return found


def _report_of(
    project: Project, artifacts: Mapping[str, Artifact], known: Mapping[str, Registration]
) -> dict[str, str] | None:
    """Return digests of the report and of all that it shows; None when it or the numbers beside it are not there."""
    html, numbers = report_file(project), numbers_digests(project)
    if not html.is_file() or numbers is None:
        return None
    templates = sorted((Path(__file__).parents[2] / "templates").glob("*.j2"))
    shown: dict[str, Any] = {
        "params": project.params.model_dump(),
        "artifacts": {name: sha256(artifact.path / "artifact.json") for name, artifact in artifacts.items()},
        "registered": {name: [one.version, one.digest, one.aliases] for name, one in known.items()},
        "code": _report_code(project),
        "numbers": numbers,
        "templates": {path.name: sha256(path) for path in templates},
    }
    return {"report": sha256(html), "of": key_digest(shown)}


def _report_code(project: Project) -> dict[str, str]:
    """Return the digests of the modules that make the report and the numbers beside it."""
    made_by = ("rrlhf.tools.reporting.report", "rrlhf.tools.reporting.numbers", "rrlhf.tools.lineage.load")
    return project.modules.closure(*made_by)


def _noted_report(project: Project) -> dict[str, str] | None:
    try:
        found: dict[str, str] = json.loads(_note_of(project).read_bytes())
    except (OSError, ValueError):
        return None
    return found


def _note_of(project: Project) -> Path:
    return project.root / ".rrlhf" / "reports" / f"{project.profile}.json"
