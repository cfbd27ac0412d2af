"""Prefect's server on this machine: for the length of one run, or with all that deployments need beside it.

Prefect is only started here, as a process, never imported: that takes seconds in which the process already works.
"""

import atexit
import logging
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple
from urllib.error import HTTPError

from rrlhf.environment import check_room, end_with_parent
from rrlhf.located import MendableError, UsageError
from rrlhf.locks import locked
from rrlhf.pipeline.tracking.server import PAGES, AwayError
from rrlhf.pipeline.tracking.tracker import Tracker
from rrlhf.progress import in_words, say
from rrlhf.sourcecode import importable
from rrlhf.stopping import STOPPING, check_stop, stop_between_steps

HOST = "127.0.0.1"
POOL = "rrlhf"
STARTING = Path(".rrlhf", "starting")  # held while a server migrates the database, which two at once break
NO_JOBS = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}  # eight processes more, for features not used here
SECONDS_TO_START = 120.0
SECONDS_TO_STOP = 15.0
PREFECT = [sys.executable, "-m", "prefect", "--no-prompt"]
ADDRESSES = """
Prefect  {prefect}
MLflow   {mlflow}

Start a run from another shell:
  export PREFECT_API_URL={api}
  {command} deployment run reward-robust-rlhf/default -p 'overrides={{"ppo.kl_weight": 0.05}}' --watch

Ctrl-C stops everything."""


class ServeError(MendableError):
    """Something that serving needs did not start."""


class Service(NamedTuple):
    """A process that serves, and where its output goes."""

    process: subprocess.Popen[bytes]
    log: Path

    def wait_for(self, address: str) -> None:
        """Return when an address answers.

        Raises ServeError when it does not or the process ends, FullError for a full disk, and Interrupted if asked.
        """
        give_up = time.monotonic() + SECONDS_TO_START
        while time.monotonic() < give_up and self.process.poll() is None:
            check_stop()
            try:
                urllib.request.urlopen(address, timeout=2).close()
                return
            except OSError:
                time.sleep(0.3)
        check_room(self.log.parent)  # the reason that is not in the log
        ended = self.process.poll()
        why = f"does not answer after {SECONDS_TO_START:.0f} s" if ended is None else f"ended with {ended}"
        said = [line for line in self.log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        raise ServeError("\n".join([f"the service at {address} {why}; its log, {self.log}, ends with", *said[-3:]]))


def serve(root: Path, experiment: str, prefect_port: int, mlflow_port: int) -> None:
    """Start all services, print their addresses, and stop them at Ctrl-C, SIGTERM, or when one of them ends.

    Deploys what prefect.yaml declares, and has the automations of automations.yaml on the server.
    """
    api = f"http://{HOST}:{prefect_port}/api"
    environment = os.environ | {
        "PREFECT_API_URL": api,
        "PREFECT_SERVER_API_PORT": str(prefect_port),  # the pages ask this port
        "PREFECT_WORKER_QUERY_SECONDS": "2",
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",  # seconds; automations.yaml watches for it
        PAGES: f"http://{HOST}:{mlflow_port}",
    }
    check_room(root)
    Tracker(root, experiment)  # makes the database, which several processes at once could not
    stop_between_steps("\nstopping the services")  # in order: a worker without its server would linger for minutes
    mlflow = f"http://{HOST}:{mlflow_port}"
    with ExitStack() as services:
        with locked(root / STARTING):
            start = _service("Prefect server", [*PREFECT, "server", "start", "--host", HOST], environment, root)
            server = services.enter_context(start)
            server.wait_for(f"{api}/health")
        for prepare in (
            [sys.executable, "-m", "rrlhf.execution.automations"],
            [*PREFECT, "work-pool", "create", POOL, "--type", "process", "--overwrite"],
            [*PREFECT, "deploy", "--all"],
        ):
            done = subprocess.run(prepare, cwd=root, env=environment, capture_output=True, text=True)
            if done.returncode:
                raise ServeError(f"{' '.join(prepare[2:])} failed:\n{done.stdout}{done.stderr}")
        work = _service("worker", [*PREFECT, "worker", "start", "--pool", POOL], environment, root)
        kept = ["--backend-store-uri", f"sqlite:///{root / 'mlflow.db'}"]
        kept += ["--default-artifact-root", (root / "mlartifacts").as_uri()]
        command = [sys.executable, *f"-m mlflow server --host {HOST} --port {mlflow_port} --workers 1".split()]
        show = _service("MLflow", [*command, *kept], NO_JOBS | environment, root)
        with work as worker, show as pages:
            pages.wait_for(f"{mlflow}/health")
            beside = Path(sys.executable).with_name("prefect")
            known = {"api": api, "prefect": f"http://{HOST}:{prefect_port}", "mlflow": mlflow}
            known["command"] = str(beside.relative_to(root) if beside.is_relative_to(root) else beside)
            print(ADDRESSES.format(**known), flush=True)
            while all(each.process.poll() is None for each in (server, worker, pages)):
                check_stop()
                time.sleep(0.5)
            raise ServeError(f"a service ended; see {server.log.parent}")


def started(root: Path, experiment: str, flow: str, results: int = 0) -> Any:
    """Return a flow of the project's own flows/ once Prefect answers; Ctrl-C then stops between steps.

    Raises UsageError when the project has no such flow, ServeError when Prefect does not answer, TrackingError when
    MLflow refuses, and FullError when the disk has no room.
    results: bytes that the flow will write, as far as that is known.
    """
    if not (file := root / "flows" / f"{flow}.py").is_file():
        raise UsageError(f"{file}: not there; `rrlhf init` in an empty folder makes one")
    importable(root)
    check_room(root, results)
    say("starting: Prefect, MLflow and their databases")
    began = time.monotonic()
    wait_until_ready = start_temporary_server(root)
    found = import_module(f"flows.{flow}")  # takes seconds, in which the server starts
    with suppress(AwayError):  # the flow says so, and goes on without it
        Tracker(root, experiment)
    wait_until_ready()
    say(f"started in {in_words(time.monotonic() - began)}")
    stop_between_steps(STOPPING)
    for handler in logging.getLogger().handlers:
        handler.addFilter(_message_only)
    return getattr(found, flow)


def start_temporary_server(root: Path) -> Callable[[], None]:
    """Start a Prefect server for this process, unless PREFECT_API_URL names one; return a function that waits for it.

    Prefect would start one itself, but in reach of Ctrl-C: the run could then not report how it ended, and would
    hang trying. Call this before Prefect is imported: what is registered first is stopped last, when Prefect has
    sent its last events.
    """
    if api := os.environ.get("PREFECT_API_URL"):
        try:
            urllib.request.urlopen(f"{api}/health", timeout=5).close()
        except HTTPError:
            pass  # it answers; Prefect's client knows how to log in
        except OSError as error:
            raise ServeError(
                f"the Prefect server of PREFECT_API_URL, {api}, does not answer ({error}): start it, or unset "
                "PREFECT_API_URL to run without one"
            ) from None
        return lambda: None
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
    api = os.environ["PREFECT_API_URL"] = f"http://{HOST}:{port}/api"
    command = [*PREFECT, "server", "start", "--host", HOST, "--port", str(port)]
    command += ["--no-ui", "--no-scheduler", "--no-late-runs"]  # it lasts for one run, and no worker asks it for others
    starting, services = ExitStack(), ExitStack()
    starting.enter_context(locked(root / STARTING))
    server = services.enter_context(_service("run", command, os.environ, root))
    atexit.register(services.close)

    def wait_until_ready() -> None:
        with starting:
            server.wait_for(f"{api}/health")

    return wait_until_ready


def _message_only(record: logging.LogRecord) -> bool:
    """Keep tracebacks off the terminal, where the command says what went wrong; Prefect's records keep them."""
    record.exc_info = record.exc_text = None
    said = ("Encountered exception", "Task run failed", "Crash detected", "Finished in state Crashed")
    return not record.getMessage().startswith(said)


@contextmanager
def _service(name: str, command: list[str], environment: Mapping[str, str], root: Path) -> Iterator[Service]:
    """Run a service beside this process, its output in a file; stop it, and what it started, at the end."""
    log = root / ".rrlhf" / "serve" / f"{name.replace(' ', '-').lower()}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        # A session of its own: Ctrl-C reaches this process alone, which then stops the services in order.
        started: dict[str, Any] = {"start_new_session": True, "preexec_fn": end_with_parent}
        process = subprocess.Popen(command, cwd=root, env=environment, stdout=output, stderr=output, **started)
        try:
            yield Service(process, log)
        finally:
            process.terminate()
            try:
                process.wait(SECONDS_TO_STOP)
            except subprocess.TimeoutExpired:
                process.kill()
