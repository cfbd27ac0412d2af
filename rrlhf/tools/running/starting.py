"""What a command does before it runs a flow in its own process."""

from __future__ import annotations

import logging
import time
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

from rrlhf.environment import check_room
from rrlhf.progress import in_words, say
from rrlhf.stopping import STOPPING, stop_between_steps


def started(root: Path, experiment: str, module: str, results: int = 0) -> Any:
    """Import a module of flows once Prefect answers, and let Ctrl-C stop between steps.

    Raises ServeError when Prefect does not, TrackingError when MLflow refuses, and FullError when the disk has no room.
    results: bytes that the flow will write, as far as that is known.
    """
    from rrlhf.tools.serving import start_temporary_server

    check_room(root, results)
    say("starting: Prefect, MLflow and their databases")
    began = time.monotonic()
    wait_until_ready = start_temporary_server(root)
    # Both imports take seconds, in which the server starts.
    found = import_module(module)
    from rrlhf.pipeline.tracking import AwayError, Tracker

    with suppress(AwayError):  # the flow says so, and goes on without it
        Tracker.connect(root, experiment)
    wait_until_ready()
    say(f"started in {in_words(time.monotonic() - began)}")
    stop_between_steps(STOPPING)
    _quiet_console()
    return found


def _quiet_console() -> None:
    """Keep tracebacks off the terminal, where the command says what went wrong; Prefect's records keep them."""

    def message_only(record: logging.LogRecord) -> bool:
        record.exc_info = record.exc_text = None
        return not record.getMessage().startswith(
            ("Encountered exception", "Task run failed", "Crash detected", "Finished in state Crashed")
        )

    for handler in logging.getLogger().handlers:
        handler.addFilter(message_only)
