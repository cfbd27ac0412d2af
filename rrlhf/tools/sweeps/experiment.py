"""Experiments: sweeps written down, one file of experiments/ each, with the question that it answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from rrlhf.config import Section
from rrlhf.located import ParamsError, Where, did_you_mean, place, read
from rrlhf.types import Json

FOLDER = "experiments"


class Experiment(Section):
    """What is swept, over which settings, and which policy the others are compared with."""

    question: str
    profile: str = "default"
    settings: dict[str, Any] = Field(default_factory=dict)  # what it changes of the profile, as a profile would
    sweep: dict[str, list[Any]]  # by dotted name: values
    baseline: str


def experiments(root: Path) -> list[str]:
    """Return the names of the experiments that there are."""
    return sorted(path.stem for path in (root / FOLDER).glob("*.yaml"))


def load_experiment(root: Path, name: str) -> Experiment:
    """Read an experiment. Raises ParamsError with every mistake."""
    if name not in experiments(root):
        raise ParamsError(f"unknown experiment {name!r}{did_you_mean(name, experiments(root))}")
    where: Where = {}
    mistakes: list[str] = []
    content: dict[str, Json] = read(root / FOLDER / f"{name}.yaml", where, mistakes)
    try:
        found = Experiment.model_validate(content)
    except ValidationError as error:
        for detail in error.errors():
            path = tuple(str(part) for part in detail["loc"])
            mistakes.append(f"{place(path, where)}: {'.'.join(path)}: {detail['msg']}")
    if mistakes:
        raise ParamsError("\n".join(mistakes))
    return found
