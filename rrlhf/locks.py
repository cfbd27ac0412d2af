"""Locks between processes, and whether one is there."""

import fcntl
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import IO


@contextmanager
def locked(path: Path) -> Iterator[IO[str]]:
    """Hold the lock of a file, waiting for it if need be; the file goes with it.

    The kernel drops a lock with the last process that has the file open: this one, or one that was handed the file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        with path.open("a+", encoding="utf-8") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                handle.seek(0)
                print(f"waiting for {handle.read().strip() or 'another run'}", file=sys.stderr, flush=True)
                fcntl.flock(handle, fcntl.LOCK_EX)
            if not _is_there(handle, path):
                continue  # it went with who held it
            handle.truncate(0)
            handle.write(f"process {os.getpid()} or what it started, at work since {datetime.now():%H:%M:%S}")
            handle.flush()
            try:
                yield handle
            finally:
                path.unlink(missing_ok=True)
            return


def _is_there(handle: IO[str], path: Path) -> bool:
    """Whether an open file still has its path."""
    try:
        return os.path.samestat(os.fstat(handle.fileno()), path.stat())
    except FileNotFoundError:
        return False


def holder(lock: Path) -> str | None:
    """Return what the process that holds a lock wrote into it; None when nobody holds it."""
    try:
        with lock.open(encoding="utf-8") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return handle.read().strip() or "another process"
    except FileNotFoundError:
        pass
    return None


def is_alive(process: int) -> bool:
    """Whether this machine runs a process with this number."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
