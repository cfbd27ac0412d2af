"""How far a loop is: a bar with the time left on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

from rrlhf.redact import visible

if TYPE_CHECKING:
    from rich.progress import Progress

Item = TypeVar("Item")

SECONDS_TO_FIRST_LINE, SECONDS_BETWEEN_LINES = 1.0, 10.0

_lock = threading.Lock()
_shown: Progress | None = None  # the display, while some loop uses it
_users = 0


def say(text: str) -> None:
    """Tell on stderr, at once, what begins: whatever reads it through a pipe would else wait for minutes."""
    print(visible(text), file=sys.stderr, flush=True)


def is_main_process() -> bool:
    """Whether this process is the one, of those of a distributed launch, that speaks and writes."""
    return os.environ.get("RANK", "0") == "0"


def track(iterable: Iterable[Item], total: int, label: str) -> Iterator[Item]:
    """Yield the items and show how many of `total` are done."""
    with meter(total, label) as show:
        for done, item in enumerate(iterable, 1):
            yield item
            show(done)


@contextmanager
def meter(total: int, label: str) -> Iterator[Callable[[int], None]]:
    """Show how far a loop is; yield a function that takes how many of `total` are done."""
    if not is_main_process():
        yield lambda done: None
    elif sys.stderr.isatty():
        with _display() as display:
            task = display.add_task(label, total=total)
            yield lambda done: display.update(task, completed=done)
    else:
        yield _lines(total, label)


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


def _lines(total: int, label: str) -> Callable[[int], None]:
    start = time.monotonic()
    first = due = start + SECONDS_TO_FIRST_LINE

    def show(done: int) -> None:
        nonlocal due
        now = time.monotonic()
        if now >= due or (done == total and due > first):
            due = now + SECONDS_BETWEEN_LINES
            left = (now - start) / done * max(total - done, 0)
            print(f"{label}  {done}/{total}  {in_words(left)} left", file=sys.stderr, flush=True)

    return show


def in_words(seconds: float) -> str:
    """Return a duration as people say it: "8 s", "3 min 05 s", "2 h 10 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
