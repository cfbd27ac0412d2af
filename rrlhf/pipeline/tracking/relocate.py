"""A project folder that was moved or copied: the places of files in its MLflow database, written anew.

MLflow writes down absolute addresses and has no way to change them (github.com/mlflow/mlflow/issues/3144), so this one
command writes into its tables. Nothing but those addresses changes: versions, aliases and evidence stay.
"""

from __future__ import annotations

import sqlite3
from contextlib import closing
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
    try:
        with closing(sqlite3.connect(database, timeout=5)) as connection:
            ours = f"%/{FILES}"
            known = connection.execute(
                "select distinct artifact_location from experiments where artifact_location like ?", [ours]
            )
            before = [place for (place,) in known if place != here]
            if not before:
                return f"{database} names the files beside it already"
            if not (root / FILES).is_dir():
                raise TrackingError(
                    f"{root / FILES} is not here: copy {unquote(urlparse(before[0]).path)} beside {database.name}"
                )
            backup = _backup(connection, database)
            changed = _rewrite(connection, before, here)
    except sqlite3.Error as error:
        raise TrackingError(f"{database}: {error}; stop what uses it and try again") from None
    return f"{changed} places in {database.name} now lie in {root / FILES}; the database as it was: {backup.name}"


def _backup(connection: sqlite3.Connection, database: Path) -> Path:
    """Copy a database beside it, under a name that is free."""
    numbers = (database.with_name(f"{database.name}.before-relocate{number or ''}") for number in range(1000))
    backup = next(path for path in numbers if not path.exists())
    with closing(sqlite3.connect(backup)) as copy:
        connection.backup(copy)
    return backup


def _rewrite(connection: sqlite3.Connection, before: list[str], here: str) -> int:
    """Replace the start of every place in one transaction; return how many there were."""
    changed = 0
    with connection:
        connection.execute("begin immediate")
        for old in before:
            for table, column in PLACES.items():
                inside = f"{column} = ?2 or substr({column}, 1, length(?2) + 1) = ?2 || '/'"
                change = f"update {table} set {column} = ?1 || substr({column}, length(?2) + 1) where {inside}"
                changed += connection.execute(change, [here, old]).rowcount
    return changed
