"""Runs that ended while the tracking server was away: what is to be told to it, as files, told once and in order.

The artifacts hold every number and file, and registering is idempotent: a note says only which artifacts, in which run.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from rrlhf.files import write
from rrlhf.locks import locked
from rrlhf.pipeline.graph import DATA
from rrlhf.pipeline.store import Store
from rrlhf.pipeline.tracking.tracker import Tracker
from rrlhf.types import Json

FOLDER = Path(".rrlhf", "unsynced")


class Made(NamedTuple):
    """A node's result in such a run."""

    stage: str
    key: str
    aliases: list[str]  # that its model gets


class Unsynced(NamedTuple):
    """Such a run."""

    experiment: str
    profile: str
    name: str
    settings: Mapping[str, Json]
    commit: str | None
    run_id: str  # that the server gave it before it went away; "" where it was away from the start
    made: list[Made]  # the data set first
    files: list[str]  # to keep with the run, from the project's folder


def waiting(root: Path) -> list[Path]:
    """Return the notes of all runs that the server does not know, in their order."""
    return sorted((root / FOLDER).glob("*.json"))


def results(root: Path) -> list[Made]:
    """Return what these runs made."""
    return [made for path in waiting(root) for made in _read(path).made]


def note(root: Path, run: Unsynced) -> None:
    """Note a run that ended while the server was away."""
    with locked(root / FOLDER / "lock"):
        before = waiting(root)
        number = int(before[-1].stem) + 1 if before else 1
        write(root / FOLDER / f"{number:06}.json", json.dumps(run._asdict()))


def sync(root: Path) -> Iterator[str]:
    """Tell the server of every such run, and yield what was told, a line for each.

    Raises AwayError when it is still away: what it was told stays told, and the rest waits.
    """
    with locked(root / FOLDER / "lock"):
        for path in waiting(root):
            run = _read(path)
            count = _register(root, run)
            path.unlink()
            yield f"{run.name}: {count} results registered"


def _read(path: Path) -> Unsynced:
    run = Unsynced(**json.loads(path.read_bytes()))
    return run._replace(made=[Made(*each) for each in run.made])


def _register(root: Path, run: Unsynced) -> int:
    """Register the results of a run that are still here; return how many there are."""
    tracker, store = Tracker(root, run.experiment), Store(root)
    run_id = run.run_id
    if not tracker.knows(run_id):
        run_id = tracker.start_flow(run.profile, run.settings, run.commit, name=run.name)
    artifacts = [(artifact, each) for each in run.made if (artifact := store.find(each.stage, each.key))]
    data = next((artifact.dataset for artifact, _ in artifacts if artifact.name == DATA), None)
    for artifact, each in artifacts:
        if artifact.name != DATA:
            dataset = data if DATA in artifact.inputs else None
            tracker.register(artifact, dataset, profile=run.profile, aliases=each.aliases, parent=run_id)
    for file in run.files:
        if (root / file).is_file():
            tracker.log_report(run_id, root / file)
    tracker.finish_flow(run_id, "FINISHED")
    return sum(artifact.name != DATA for artifact, _ in artifacts)
