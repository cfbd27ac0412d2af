"""Digests of files that have not changed since they were read, so that checking gigabytes takes no time.

A file counts as unchanged with the same size, inode, and times of content (mtime) and of change (ctime). A program can
set the first time back, the second only the kernel writes.
"""

import hashlib
import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rrlhf.files import write

TICK = 10_000_000  # ns; the longest step of the clock that file systems stamp times with (Linux: 1 to 10 ms)

Mark = list[int]  # size, mtime and ctime in ns, inode


def mark_of(path: Path) -> Mark | None:
    """Return what changes with a file; None while it is so new that another change might leave the same times."""
    stat = path.stat()
    if time.time_ns() - max(stat.st_mtime_ns, stat.st_ctime_ns) > TICK:
        return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
    return None  # written to at this moment, or stamped by another machine's clock


class Memory:
    """A JSON object in a file, kept by whoever writes last; losing an entry only costs finding it again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.known: dict[str, Any] = {**json.loads(path.read_bytes())}
        except (OSError, ValueError, TypeError, RecursionError):
            self.known = {}
        self.grew = self._held = False
        self._saving = threading.Lock()

    @contextmanager
    def once(self) -> Iterator[None]:
        """Save at the end, and not at every call between: each writes all of it."""
        self._held = True
        try:
            yield
        finally:
            self._held = False
            self.save()

    def save(self) -> None:
        """Write what was learned, if anything."""
        with self._saving:
            if self._held or not self.grew:
                return
            self.grew = False
            write(self.path, json.dumps(dict(self.known)))


class Memo(Memory):
    """Digests by path, from memory while the file is unchanged."""

    def sha256(self, path: Path, expected: str | None = None) -> str:
        """Return the file's sha256 in hex.

        expected: what the file should have; when memory says otherwise, memory may be wrong, and the file is read.
        """
        mark, name = mark_of(path), str(path.resolve())
        known = self.known.get(name)
        if mark and known and known[:4] == mark and expected in {None, known[4]}:
            return str(known[4])
        digest = sha256(path)
        if mark:
            self.known[name] = [*mark, digest]
            self.grew = True
        return digest

    def forget(self, folder: Path) -> None:
        """Have the files in a folder read again."""
        for name in self._inside(folder):
            del self.known[name]
        self.grew = True

    def renamed(self, old: Path, new: Path) -> None:
        """Keep what is known of the files in a folder that was renamed."""
        for name in self._inside(old):
            self.known[name.replace(str(old.resolve()), str(new.resolve()), 1)] = self.known.pop(name)
        self.grew = True
        self.save()

    def _inside(self, folder: Path) -> list[str]:
        inside = f"{folder.resolve()}{os.sep}"
        return [name for name in list(self.known) if name.startswith(inside)]


def sha256(path: Path) -> str:
    """Return the sha256 of a file, in hex."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
