"""What is registered, as a plan and a run with nothing to do ask: MLflow tells it, and that is noted.

Asking takes the seconds of MLflow's import. The note holds as long as the database is the very file that was asked; a
server is asked every time.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any, NamedTuple

from rrlhf.files import write
from rrlhf.memo import TICK, mark_of
from rrlhf.pipeline.tracking.server import address, database

NOTE = Path(".rrlhf", "registered.json")


class Registration(NamedTuple):
    """What is registered under a key and a name."""

    key: str
    name: str  # of the model; "" where only a run is kept (the evaluation)
    version: str  # "" for such a run
    digest: str
    aliases: list[str]
    complete: bool  # its run holds everything and is linked to what it read


Registrations = dict[tuple[str, str], Registration]  # by key and name


def registrations(root: Path, experiment: str) -> Registrations:
    """Return everything that is registered. Raises TrackingError when that cannot be told."""
    file = database(root)
    if file and not file.exists():
        return {}
    noted = _noted(root, experiment)
    found = take_note(root, experiment) if noted is None else noted
    return {(one.key, one.name): one for one in found}


def take_note(root: Path, experiment: str) -> list[Registration]:
    """Ask MLflow for everything that is registered, and note it."""
    from rrlhf.pipeline.tracking.tracker import Tracker

    time.sleep(2 * TICK / 1e9)  # then what is written from now on has another time
    of = _of(root, experiment)
    found = Tracker.connect(root, experiment).registrations()
    if of:
        write(root / NOTE, json.dumps({"of": of, "registered": found}))
    return found


def _noted(root: Path, experiment: str) -> list[Registration] | None:
    """Return what is noted; None when it was of another database, or of this one as it was before."""
    try:
        note = json.loads((root / NOTE).read_bytes())
    except (OSError, ValueError):
        return None
    return [Registration(*one) for one in note["registered"]] if note["of"] == _of(root, experiment) else None


def _of(root: Path, experiment: str) -> list[Any] | None:
    """Return what a note is of; None for a server, which does not tell when it was written to."""
    file = database(root)
    mark = mark_of(file) if file and file.exists() else None
    return [address(root), experiment, mark] if mark else None
