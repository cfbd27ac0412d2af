"""How a run ends before its end: after Ctrl-C or SIGTERM between two steps, so that none is cut in two.

Whatever lasts asks `check_stop` after each of its steps.
"""

import os
import signal
import sys
import threading

STOPPING = "\nstopping after this step; once more stops at once"

stop = threading.Event()
signalled = signal.SIGINT  # what asked the run to stop


class Interrupted(KeyboardInterrupt):
    """The run was asked to stop, and did between two steps."""


def check_stop() -> None:
    """Raise Interrupted when the run was asked to stop."""
    if stop.is_set():
        raise Interrupted


def stop_between_steps(message: str = "") -> None:
    """Let the first Ctrl-C or SIGTERM end the run after this step, saying `message`, and a second one at once.

    Does nothing in other threads than the main one, which Python hands its signals to.
    """

    def ask(number: int, frame: object) -> None:
        global signalled
        signalled = signal.Signals(number)
        if stop.is_set():
            os._exit(128 + number)  # nothing to tidy up: results appear by one rename, or not at all
        stop.set()
        if message:
            print(message, file=sys.stderr, flush=True)

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, ask)
