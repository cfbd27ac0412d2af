"""How far a loop is: a bar with the time left on a terminal, a line now and then elsewhere.

The loops are also where a run stops: after Ctrl-C the next step raises `Interrupted`, so no step is cut in two.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from rich.progress import Progress

Item = TypeVar("Item")

SECONDS_BETWEEN_LINES = 10.0

stop = threading.Event()

_lock = threading.Lock()
_shown: Progress | None = None  # the display, while some loop uses it
_users = 0


class Interrupted(KeyboardInterrupt):
    """The run was asked to stop, and did between two steps."""


def check_stop() -> None:
    """Raise Interrupted when the run was asked to stop."""
    if stop.is_set():
        raise Interrupted


def is_main_process() -> bool:
    """Whether this process is the one, of those of a distributed launch, that speaks and writes."""
    return os.environ.get("RANK", "0") == "0"


def track(iterable: Iterable[Item], total: int, label: str) -> Iterator[Item]:
    """Yield the items and show how many of `total` are done; nothing is shown before the first or after a break."""
    if not is_main_process():
        shown: Iterable[Item] = iterable
    elif sys.stderr.isatty():
        shown = _bar(iterable, total, label)
    else:
        shown = _lines(iterable, total, label)
    for item in shown:
        yield item
        check_stop()


def _bar(iterable: Iterable[Item], total: int, label: str) -> Iterator[Item]:
    with _display() as progress:
        yield from progress.track(iterable, total=total, description=label)


@contextmanager
def _display() -> Iterator[Progress]:
    """Share one display between the loops of several threads: a terminal has room for one."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    global _shown, _users
    with _lock:
        if _shown is None:
            _shown = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(elapsed_when_finished=True),
                console=Console(stderr=True),
            )
            _shown.start()
        _users += 1
        display = _shown
    try:
        yield display
    finally:
        with _lock:
            _users -= 1
            if _users == 0:
                display.stop()
                _shown = None


def _lines(iterable: Iterable[Item], total: int, label: str) -> Iterator[Item]:
    start = shown = time.monotonic()
    for done, item in enumerate(iterable, 1):
        yield item
        now = time.monotonic()
        if now - shown >= SECONDS_BETWEEN_LINES or (done == total and shown > start):
            shown = now
            left = (now - start) / done * (total - done)
            print(f"{label}  {done}/{total}  {in_words(left)} left", file=sys.stderr, flush=True)


def in_words(seconds: float) -> str:
    """Return a duration as people say it: "8 s", "3 min 05 s", "2 h 10 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
