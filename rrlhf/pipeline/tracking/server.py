"""The connection to MLflow: opening it, and its errors."""

from __future__ import annotations

import os
import re
import sqlite3
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from urllib.parse import quote

from rrlhf.locks import locked
from rrlhf.pipeline.tracking.registry import FILES, SQLITE, TrackingError, address, check_place, moved

PAGES = "RRLHF_MLFLOW_PAGES"  # address of a server that shows a local database, set by `rrlhf serve`
SECONDS_TO_ANSWER = 30  # of the first question; a server that was idle may have to wake up
SECONDS_UNTIL_TOLD = 2  # that it is waited for
SECONDS_TO_UPLOAD = 600

ENVIRONMENT = {
    "DO_NOT_TRACK": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",  # the default of 7 blocks for four minutes when the server is down
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}

_transfer = threading.Lock()


def connect(root: Path, experiment: str) -> tuple[str, str]:
    """Open the server of MLFLOW_TRACKING_URI, or else `root`/mlflow.db; return its URI and the experiment's id.

    What is missing is created. Raises TrackingError when the server does not answer, or refuses.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    uri = address(root)
    check_place(root, experiment)
    with trouble(uri):
        artifacts = None
        if uri.startswith(SQLITE):
            database = Path(uri.removeprefix(SQLITE)).absolute()
            _create_database(database)
            _check_database(database)
            artifacts = (database.parent / FILES).as_uri()
        elif uri.startswith("http"):
            _check_answer(uri)
        _use(uri)
        return uri, _experiment_id(uri, experiment, artifacts)


def _create_database(database: Path) -> None:
    """Make MLflow's tables once: beside, then renamed, because several processes doing it at once crash."""
    if database.exists():
        return
    from mlflow import MlflowClient

    with locked(database.with_name(f"{database.name}.lock")):
        if database.exists():
            return
        for left in database.parent.glob(f"{database.name}.new*"):
            left.unlink()
        beside = database.with_name(f"{database.name}.new{os.getpid()}")
        MlflowClient(tracking_uri=f"{SQLITE}{beside}", registry_uri=f"{SQLITE}{beside}")
        beside.rename(database)


def _check_database(database: Path) -> None:
    """Raise TrackingError for a damaged file: MLflow would try to open it again and again, for an hour."""
    try:
        with closing(sqlite3.connect(database)) as connection:
            connection.execute("pragma schema_version")
    except sqlite3.DatabaseError as error:
        raise TrackingError(f"{database}: {error}; remove it, and the next run fills a new one") from None


def _check_answer(uri: str) -> None:
    """Raise TrackingError unless the server answers a first question, and does not ask who we are."""
    from mlflow.utils.credentials import get_default_host_creds
    from mlflow.utils.rest_utils import http_request

    with told_after(SECONDS_UNTIL_TOLD, f"waiting up to {SECONDS_TO_ANSWER} s for the tracking server {_shown(uri)}"):
        answer = http_request(
            get_default_host_creds(uri),
            "/api/2.0/mlflow/experiments/search",
            "GET",
            params={"max_results": 1},
            timeout=SECONDS_TO_ANSWER,
            max_retries=0,
            raise_on_status=False,
        )
    if answer.status_code in {401, 403}:
        raise TrackingError(
            f"the tracking server {_shown(uri)} refuses access ({answer.status_code}): set MLFLOW_TRACKING_USERNAME "
            "and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
        )


@contextmanager
def told_after(seconds: float, text: str) -> Iterator[None]:
    """Say on stderr what is waited for, if what is done here takes longer than that."""
    timer = threading.Timer(seconds, print, (text,), {"file": sys.stderr, "flush": True})
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _use(uri: str) -> None:
    """Point MLflow's global client at the server: its registry asks that one about logged models."""
    import mlflow

    given = os.environ.get("MLFLOW_TRACKING_URI")
    mlflow.set_tracking_uri(uri)  # also writes the variable, which would then decide for every other folder
    if given is None:
        os.environ.pop("MLFLOW_TRACKING_URI", None)


def _experiment_id(uri: str, name: str, artifacts: str | None) -> str:
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return str(client.create_experiment(name, artifacts))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            found = client.get_experiment_by_name(name)  # another process was faster
    if found.lifecycle_stage == "deleted":
        raise TrackingError(
            f"the experiment {name!r} was deleted: mlflow experiments restore --experiment-id {found.experiment_id}, "
            "or choose another name in tracking.experiment"
        )
    if artifacts and found.artifact_location != artifacts:
        raise moved(found.artifact_location)
    return str(found.experiment_id)


def errors() -> tuple[type[Exception], ...]:
    """Return the errors by which MLflow's client says that the server is away or refuses."""
    from mlflow.exceptions import MlflowException
    from requests import RequestException

    return MlflowException, RequestException


@contextmanager
def trouble(uri: str) -> Iterator[None]:
    """Turn the client's errors into TrackingError."""
    try:
        yield
    except errors() as error:
        way_out = (
            "check that the file can be written and that the disk is not full"
            if uri.startswith(SQLITE)
            else "check MLFLOW_TRACKING_URI and start the server again, or unset the variable to use mlflow.db here"
        )
        raise TrackingError(
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
    cause = re.search(r"Caused by \w+\(.*: (.*?)[\"']\)+$", line)  # said last, after what was asked of whom
    return _shown(cause[1] if cause else line)[:300]


def warn(name: str, error: Exception) -> None:
    """Say once on the terminal that numbers wait for a server that is away."""
    print(f"{name}  the tracking server does not answer; the run goes on ({_first_line(error)})", file=sys.stderr)


@contextmanager
def long_requests() -> Iterator[None]:
    """Give transfers of whole models more time than a question gets; one at a time, for the variable is shared."""
    name = "MLFLOW_HTTP_REQUEST_TIMEOUT"
    with _transfer:
        before = os.environ[name]
        os.environ[name] = str(max(int(before), SECONDS_TO_UPLOAD))
        try:
            yield
        finally:
            os.environ[name] = before
