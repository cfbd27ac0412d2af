"""What MLflow's registry holds, read in milliseconds: straight from its database, without importing mlflow.

Only looked at, never relied on: restoring and registering ask MLflow itself. Where the database is a server's, or is
not laid out as expected, the answer is "unknown".
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import NamedTuple

SQLITE = "sqlite:///"
FILES = "mlartifacts"  # folder of MLflow's files, beside the database that names them
AT_ONCE = 500  # keys in one question; SQLite allows more

# The newest ready version of each key and name comes last.
VERSIONS = """
select k.value, v.name, v.version, json_extract(m.value, '$.digest') from model_versions v
join model_version_tags k on k.name = v.name and k.version = v.version and k.key = 'rrlhf.key'
join model_version_tags m on m.name = v.name and m.version = v.version and m.key = 'rrlhf.made'
where v.status = 'READY' and k.value in ({keys}) order by v.creation_time, v.version
"""
# A run is given its artifact's digest when all that belongs to it was written.
RUNS = """
select k.value, d.value from runs r
join experiments e on e.experiment_id = r.experiment_id and e.name = ? and e.lifecycle_stage = 'active'
join tags k on k.run_uuid = r.run_uuid and k.key = 'rrlhf.key'
join tags d on d.run_uuid = r.run_uuid and d.key = 'rrlhf.digest'
where r.lifecycle_stage = 'active' and r.status = 'FINISHED' and k.value in ({keys})
"""


class TrackingError(Exception):
    """The tracking server does not answer or refuses; the message says how to go on."""


class Registration(NamedTuple):
    """What is registered under a key and a name."""

    version: str  # "" where only a run is kept (the evaluation)
    digest: str
    aliases: frozenset[str]
    complete: bool  # its run holds everything and is linked to what it read


def address(root: Path) -> str:
    """Return the address of the tracking server: MLFLOW_TRACKING_URI, or else `root`/mlflow.db."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"{SQLITE}{root.resolve() / 'mlflow.db'}"


Registrations = dict[tuple[str, str], Registration]  # by key, and name of the model ("" where only a run is kept)


def registrations(root: Path, experiment: str, keys: Sequence[str]) -> Registrations | None:
    """Return what is registered under each of these keys; None when that cannot be told without asking a server."""
    uri = address(root)
    if not uri.startswith(SQLITE):
        return None
    database = Path(uri.removeprefix(SQLITE)).absolute()
    if not database.exists():
        return {}
    try:
        with _opened(database) as connection:
            if _elsewhere(connection, experiment, database):
                return None
            chunks = [keys[start : start + AT_ONCE] for start in range(0, len(keys), AT_ONCE)]
            return {name: found for chunk in chunks for name, found in _look(connection, experiment, chunk)}
    except sqlite3.Error:
        return None


def check_place(root: Path, experiment: str) -> None:
    """Raise TrackingError when the experiment's files are not beside its database, as in a folder that was copied."""
    uri = address(root)
    database = Path(uri.removeprefix(SQLITE)).absolute()
    if not uri.startswith(SQLITE) or not database.exists():
        return
    with suppress(sqlite3.Error), _opened(database) as connection:
        if place := _elsewhere(connection, experiment, database):
            raise moved(place)


def moved(place: str) -> TrackingError:
    """Return the error of a database that names files which are not beside it."""
    return TrackingError(
        f"this folder was moved or copied: run `rrlhf relocate`, so that mlflow.db names the files that are here, not "
        f"those in {place}"
    )


def _opened(database: Path) -> closing[sqlite3.Connection]:
    return closing(sqlite3.connect(f"{database.as_uri()}?mode=ro", uri=True, timeout=1))


def _elsewhere(connection: sqlite3.Connection, experiment: str, database: Path) -> str | None:
    """Return where the experiment keeps its files, when that is not beside this database."""
    found = connection.execute("select artifact_location from experiments where name = ?", [experiment]).fetchone()
    return str(found[0]) if found and found[0] != (database.parent / FILES).as_uri() else None


def _look(
    connection: sqlite3.Connection, experiment: str, keys: Sequence[str]
) -> Iterator[tuple[tuple[str, str], Registration]]:
    marks = ",".join("?" * len(keys))
    versions = {row[:2]: row[2:] for row in connection.execute(VERSIONS.format(keys=marks), [*keys])}
    written = set(connection.execute(RUNS.format(keys=marks), [experiment, *keys]))
    aliases: dict[tuple[str, str], set[str]] = {}
    for name, version, alias in connection.execute("select name, version, alias from registered_model_aliases"):
        aliases.setdefault((name, str(version)), set()).add(alias)
    for (key, name), (version, digest) in versions.items():
        given = frozenset(aliases.get((name, str(version)), ()))
        yield (key, name), Registration(str(version), digest, given, (key, digest) in written)
    for key, digest in written:
        yield (key, ""), Registration("", digest, frozenset(), True)
