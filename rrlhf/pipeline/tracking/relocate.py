"""A project folder that was moved or copied: the places of files in its MLflow database, written anew.

MLflow writes down absolute addresses and has no way to change them (github.com/mlflow/mlflow/issues/3144), so this one
command writes into its tables. Nothing but those addresses changes: versions, aliases and evidence stay.
"""

from __future__ import annotations

import sqlite3
from contextlib import closing
from datetime import datetime
from pathlib import Path
from urllib.parse import unquote, urlparse

from rrlhf.pipeline.tracking.server import FILES, TrackingError

PLACES = {
    "experiments": "artifact_location",
    "runs": "artifact_uri",
    "logged_models": "artifact_location",
    "model_versions": "storage_location",
}


def relocate(root: Path) -> str:
    """Have root/mlflow.db name the files that lie beside it, after a backup; say what was done.

    Raises TrackingError when there is nothing here to name, or the database is in use or not MLflow's.
    """
    database, here = root / "mlflow.db", (root / FILES).as_uri()
    if not database.exists():
        raise TrackingError(f"{database} does not exist: nothing to relocate; the next run makes one")
    backup = database.with_name(f"{database.name}.before-relocate-{datetime.now():%Y%m%dT%H%M%S%f}")
    try:
        with closing(sqlite3.connect(database, timeout=5)) as connection:
            known = "select distinct artifact_location from experiments where artifact_location like ?"
            before = [place for (place,) in connection.execute(known, [f"%/{FILES}"]) if place != here]
            if not before:
                return f"{database} names the files beside it already"
            if not (root / FILES).is_dir():
                there = unquote(urlparse(before[0]).path)
                raise TrackingError(f"{root / FILES} is not here: copy {there} beside {database.name}")
            with closing(sqlite3.connect(backup)) as copy:
                connection.backup(copy)
            with connection:
                changed = sum(_rewrite(connection, old, here) for old in before)
    except sqlite3.Error as error:
        raise TrackingError(f"{database}: {error}; stop what uses it and try again") from None
    return f"{changed} places in {database.name} now lie in {root / FILES}; the database as it was: {backup.name}"


def _rewrite(connection: sqlite3.Connection, old: str, here: str) -> int:
    """Replace the start of every place; return how many there were."""
    changed = 0
    for table, column in PLACES.items():
        inside = f"{column} = ?2 or substr({column}, 1, length(?2) + 1) = ?2 || '/'"
        change = f"update {table} set {column} = ?1 || substr({column}, length(?2) + 1) where {inside}"
        changed += connection.execute(change, [here, old]).rowcount
    return changed
