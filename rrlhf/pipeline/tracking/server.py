"""The connection to MLflow: opening it, and its errors, of which being away is one that a run survives."""

import itertools
import logging
import os
import re
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlparse

from rrlhf.located import MendableError
from rrlhf.locks import locked

SQLITE = "sqlite:///"
FILES = "mlartifacts"  # folder of MLflow's files, beside the database that names them
PAGES = "RRLHF_MLFLOW_PAGES"  # address of a server that shows a local database, set by `rrlhf serve`

ENVIRONMENT = {
    "DO_NOT_TRACK": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",  # the default of 7 blocks for four minutes when the server is down
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",  # seconds; a server that was idle may have to wake up
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}


SECONDS_TO_ANSWER = 8.0  # before a server counts as away; one that was idle may have to wake up
SECONDS_AWAY = 20.0  # for which such a server is not asked again
REFUSALS = {"UNAUTHENTICATED", "PERMISSION_DENIED", "CUSTOMER_UNAUTHORIZED"}
BROKEN = {"INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED"}  # the client's for no answer, too

_ask_again: dict[str, float] = {}  # by address of a server that is away: when, in seconds of the monotonic clock


class TrackingError(MendableError):
    """The tracking server does not answer or refuses; the message says how to go on."""


class AwayError(TrackingError):
    """The tracking server does not answer, now: what it is to be told can be told later."""


class Client:
    """MLflow's client of one server. Whatever it is asked, its errors are TrackingErrors."""

    def __init__(self, uri: str) -> None:
        from mlflow import MlflowClient

        self.uri, self._client = uri, MlflowClient(tracking_uri=uri, registry_uri=uri)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def ask(*arguments: Any, **named: Any) -> Any:
            with trouble(self.uri):
                return getattr(self._client, name)(*arguments, **named)

        return ask


def address(root: Path) -> str:
    """Return the address of the tracking server: MLFLOW_TRACKING_URI, or else `root`/mlflow.db."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"{SQLITE}{root.resolve() / 'mlflow.db'}"


def database(root: Path) -> Path | None:
    """Return the file that has the registry; None where a server has it."""
    uri = address(root)
    return Path(uri.removeprefix(SQLITE)).absolute() if uri.startswith(SQLITE) else None


def connect(root: Path, experiment: str) -> tuple[Client, str]:
    """Open the server of MLFLOW_TRACKING_URI, or else `root`/mlflow.db; return its client and the experiment's id.

    What is missing is created. Raises AwayError when the server does not answer, TrackingError when it refuses.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import mlflow

    for name in ("urllib3.connectionpool", "mlflow.store.db.utils"):  # with traces of what is raised, and told, anyway
        logging.getLogger(name).setLevel(logging.CRITICAL)
    uri, file = address(root), database(root)
    check_answer(uri)
    with locked(root / ".rrlhf" / "connect.lock"):
        if file:
            _create_database(file)
        given = os.environ.get("MLFLOW_TRACKING_URI")
        mlflow.set_tracking_uri(uri)  # the registry asks the global client about logged models
        if given is None:
            os.environ.pop("MLFLOW_TRACKING_URI", None)  # written too, it would then decide for every other folder
        client = Client(uri)
        place = (file.parent / FILES).as_uri() if file else None
        found = client.get_experiment_by_name(experiment)
        if found is None:
            return client, str(client.create_experiment(experiment, place))
        if found.lifecycle_stage == "deleted":
            raise TrackingError(
                f"the experiment {experiment!r} was deleted: choose another name in tracking.experiment, or "
                f"mlflow experiments restore --experiment-id {found.experiment_id}"
            )
        if place and found.artifact_location != place:
            raise TrackingError(
                "this folder was moved or copied: run `rrlhf relocate`, so that mlflow.db names the files that are "
                f"here, not those in {found.artifact_location}"
            )
        return client, str(found.experiment_id)


def check_answer(uri: str) -> None:
    """Raise AwayError when a server takes longer to answer anything at all than one that works would."""
    import requests

    if uri.startswith("http"):
        with trouble(uri), suppress(requests.exceptions.SSLError):  # MLflow's client knows which it has to accept
            requests.get(f"{uri.rstrip('/')}/health", timeout=SECONDS_TO_ANSWER).close()


def _create_database(file: Path) -> None:
    """Make MLflow's tables once: beside, then renamed, for a process may be killed in the seconds that this takes.

    Raises TrackingError for a damaged file: MLflow would try to open it again and again, for an hour.
    """
    if not file.exists():
        new = file.with_name(f"{file.name}.new")
        new.unlink(missing_ok=True)
        Client(f"{SQLITE}{new}")
        new.rename(file)
    with file.open("rb") as handle:
        if handle.read(16) != b"SQLite format 3\0":
            raise TrackingError(f"{file}: file is not a database; remove it, and the next run fills a new one")


def errors() -> tuple[type[Exception], ...]:
    """Return the errors by which MLflow's client says that the server is away or refuses."""
    from mlflow.exceptions import MlflowException
    from requests import RequestException

    return MlflowException, RequestException


@contextmanager
def trouble(uri: str) -> Iterator[None]:
    """Turn the client's errors into TrackingErrors; ask no server that did not answer a moment ago."""
    if time.monotonic() < _ask_again.get(uri, 0.0):
        raise AwayError(f"the tracking server {_shown(uri)} did not answer a moment ago")
    try:
        yield
    except errors() as error:
        code, kind = getattr(error, "error_code", "INTERNAL_ERROR"), TrackingError
        way_out = "check MLFLOW_TRACKING_URI and start the server again, or unset the variable to use mlflow.db here"
        if uri.startswith(SQLITE):
            way_out = "check that the file can be written and that the disk is not full"
        elif code in REFUSALS:
            way_out = "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
        elif code in BROKEN:
            kind, _ask_again[uri] = AwayError, time.monotonic() + SECONDS_AWAY
        raise kind(
            f"the tracking server {_shown(uri)} failed: {_first_line(error)}\n"
            f"{way_out}; nothing that was computed is lost"
        ) from None  # the client's error shows a password in the address


def mlflow_pages(root: Path) -> str | None:
    """Return where a browser finds MLflow's pages: the server itself, or the one that shows a local database."""
    uri = address(root)
    return _shown(uri).rstrip("/") if uri.startswith("http") else os.environ.get(PAGES)


def version_page(pages: str, name: str) -> str:
    """Return the address of the page of a registered version, "rrlhf-policy/3"."""
    model, _, number = name.partition("/")
    return f"{pages}/#/models/{quote(model)}/versions/{number}"


def _shown(text: str) -> str:
    """Return an address, or a text with addresses, without user names and passwords."""
    return re.sub(r"://[^/@\s]*@", "://", text)


def _first_line(error: Exception) -> str:
    line = str(error).partition("\n")[0]
    cause = re.search(r"Caused by \w+\(.*: (.*?)[\"']\)+$", line) or re.search(r"Pool\(.*?\): (.*)$", line)
    return _shown(cause[1] if cause else line)[:300]


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
                changed = 0
                for old, (table, column) in itertools.product(before, PLACES.items()):
                    inside = f"{column} = :old or substr({column}, 1, length(:old) + 1) = :old || '/'"
                    new = f"update {table} set {column} = :here || substr({column}, length(:old) + 1) where {inside}"
                    changed += connection.execute(new, {"here": here, "old": old}).rowcount
    except sqlite3.Error as error:
        raise TrackingError(f"{database}: {error}; stop what uses it and try again") from None
    return f"{changed} places in {database.name} now lie in {root / FILES}; the database as it was: {backup.name}"
