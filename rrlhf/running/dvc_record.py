"""DVC's record of a profile's whole pipeline: what its stages in dvc.yaml depend on and leave, for runs by either.

`dvc repro pipeline@tiny` calls `rrlhf run` and records it; `rrlhf run` called by a person leaves the same record, so
that `dvc status` is clean after both. DVC itself is loaded only when its record is not the one that the files give.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from functools import reduce
from operator import or_
from pathlib import Path
from typing import Any

from rrlhf.files import write_if_new
from rrlhf.identity.keys import key_digest
from rrlhf.identity.memo import Memo, sha256
from rrlhf.identity.modules import Modules
from rrlhf.located import ParamsError, load_yaml
from rrlhf.params import load_params
from rrlhf.reporting import numbers
from rrlhf.reporting.evaluation import Evaluation
from rrlhf.reporting.trainings import Training
from rrlhf.running.plan import Project
from rrlhf.stages import nodes
from rrlhf.types import Json
from rrlhf.versioning.datasets import commit, write_key
from rrlhf.versioning.records import declared_in, folder_digest, locked_entry

IGNORED = {"__pycache__"}  # of .dvcignore, what lies in folders that stages depend on


def write_keys(project: Project, key: Path, asked: Path) -> None:
    """Write what the stage `key` leaves: the data set's key document, and all that a run would be asked for."""
    write_key(key, project.document(project.nodes[0], {}))
    write_if_new(asked, json.dumps(asked_of(project), indent=1) + "\n")


def asked_of(project: Project) -> Json:
    """Return digests of all that a run would be asked for, before anything is known of what its stages will give.

    A node's key document with the names of its inputs for their digests, and what is done with the results.
    """
    names = {node.name: node.name for node in project.nodes}
    return {
        "stages": {node.name: key_digest(project.document(node, names)) for node in project.nodes},
        "report": key_digest(report_code(project)),
        "tracking": project.params.tracking.model_dump(),
    }


def report_code(project: Project) -> dict[str, str]:
    """Return the digests of the modules that make the report and the numbers beside it."""
    made_by = ("rrlhf.reporting.report", "rrlhf.reporting.numbers", "rrlhf.lineage.load")
    return reduce(or_, map(project.modules.closure, made_by))


def write_numbers(project: Project, evaluation: Evaluation, trainings: Mapping[str, Training]) -> None:
    """Write the files that commits are compared by, if a profile's own settings gave these numbers.

    Those of an override (--set) would stand beside settings that did not give them.
    """
    if is_as_filed(project):
        for name, text in numbers.texts(evaluation, trainings).items():
            write_if_new(numbers_folder(project) / name, text)


def numbers_digests(project: Project) -> dict[str, str] | None:
    """Return digests of what `write_numbers` wrote; None when something is missing."""
    if not is_as_filed(project):
        return {}
    paths = [numbers_folder(project) / name for name in numbers.FILES]
    return {path.name: sha256(path) for path in paths} if all(path.is_file() for path in paths) else None


def numbers_folder(project: Project) -> Path:
    """Return where dvc.yaml expects a profile's numbers."""
    return project.root / "reports" / project.profile


def is_as_filed(project: Project) -> bool:
    """Whether the graph is the one that params.yaml and profiles/ now give, without overrides."""
    try:
        return nodes(load_params(project.root, project.profile)) == project.nodes
    except ParamsError:
        return False  # edited while a run was going on


def record(project: Project, *, whole: bool) -> None:
    """Have DVC record the data set's key, and of a whole run the pipeline, as made from the files as they are.

    Nothing is recorded in a command that DVC itself called, nor of overrides, nor when settings or code were edited
    while the run went on: what is here was not made from them.
    """
    declared = declared_in(project.root, project.profile)
    if declared is None or _called_by_dvc(project.root) or not is_as_filed(project):
        return
    params = load_params(project.root, project.profile)
    now = Modules(
        project.modules.package, project.root / ".rrlhf" / "code.json"
    )  # of the files as they are, not as they were imported
    if asked_of(Project(project.root, project.profile, params, modules=now)) != asked_of(project):
        return
    data = project.root / "data"
    write_keys(project, data / f"{project.profile}.key.json", data / f"{project.profile}.run.json")
    memo = Memo(project.root / ".rrlhf" / "md5.json", "md5")
    stages = ["key", "pipeline"] if whole else ["key"]
    behind = [stage for stage in stages if not _is_recorded(project, declared, stage, memo)]
    memo.save()
    if behind:
        commit(project.root, [f"{declared}:{stage}@{project.profile}" for stage in behind])


def _called_by_dvc(root: Path) -> bool:
    """Whether this process is the command of a DVC stage of this project: DVC then records what it left."""
    return "DVC_STAGE" in os.environ and Path(os.environ.get("DVC_ROOT", "")).resolve() == root.resolve()


def _is_recorded(project: Project, project_file: Path, stage: str, memo: Memo) -> bool:
    """Whether dvc.lock says of a stage what dvc.yaml and the files do."""
    declared = _declared(project_file, stage, project.profile)
    entry = locked_entry(project_file, f"{stage}@{project.profile}")
    if entry is None or entry.get("cmd") != declared["cmd"]:
        return False
    known = {item["path"]: item.get("md5") for side in ("deps", "outs") for item in entry.get(side, [])}
    return known == {path: _digest(project.root / path, memo) for path in _paths(declared)}


def _declared(project_file: Path, stage: str, profile: str) -> dict[str, Any]:
    text = json.dumps(load_yaml(project_file)["stages"][stage]["do"])
    found: dict[str, Any] = json.loads(text.replace("${item}", profile))
    return found


def _paths(declared: dict[str, Any]) -> Iterator[str]:
    for side in ("deps", "outs", "metrics", "plots"):
        for item in declared.get(side, []):
            yield item if isinstance(item, str) else next(iter(item))


def _digest(path: Path, memo: Memo) -> str | None:
    """Return the md5 that DVC has of a file or a folder; None where there is none."""
    if path.is_dir():
        files = {file.relative_to(path): file for file in path.rglob("*") if file.is_file()}
        kept = {name.as_posix(): memo.digest(file) for name, file in files.items() if not IGNORED & {*name.parts}}
        return folder_digest(kept)
    return memo.digest(path) if path.is_file() else None
