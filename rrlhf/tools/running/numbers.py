"""The numbers of a profile's last run that git keeps, for `dvc metrics diff` and `dvc plots diff`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from rrlhf.files import write_if_new
from rrlhf.judging.evaluation import Evaluation
from rrlhf.memo import sha256
from rrlhf.pipeline.plan import Project
from rrlhf.tools.reporting import numbers
from rrlhf.tools.reporting.trainings import Training


def write_numbers(project: Project, evaluation: Evaluation, trainings: Mapping[str, Training]) -> None:
    """Write the files that commits are compared by, if a profile's own settings gave these numbers.

    Those of an override (--set) would stand beside settings that did not give them.
    """
    if project.as_filed:
        for name, text in numbers.texts(evaluation, trainings).items():
            write_if_new(_folder(project) / name, text)


def numbers_digests(project: Project) -> dict[str, str] | None:
    """Return digests of what `write_numbers` wrote; None when something is missing."""
    if not project.as_filed:
        return {}
    paths = [_folder(project) / name for name in numbers.FILES]
    return {path.name: sha256(path) for path in paths} if all(path.is_file() for path in paths) else None


def _folder(project: Project) -> Path:
    return project.root / "reports" / project.profile
