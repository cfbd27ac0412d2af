"""A store that several machines share, at any address that fsspec knows: finished artifacts, and who makes which now.

`ADDRESS/STAGE/KEY/` is a copy of `artifacts/STAGE/KEY/` whose manifest comes last, so that half a copy is none. Stages
read the folder here alone; what comes from there is checked as any other copy is (`Store.adopt`).
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from functools import cached_property
from itertools import count
from pathlib import Path
from threading import Event, Thread
from typing import TYPE_CHECKING

from rrlhf.located import MendableError
from rrlhf.pipeline.artifacts import MANIFEST, SIGNATURE, Artifact, CopyError, unsealed
from rrlhf.pipeline.store import Store
from rrlhf.progress import say
from rrlhf.stopping import check_stop

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

VARIABLE = "RRLHF_STORE"  # of the environment: the address
RELEASED = b"released"  # all that a lock says which nobody holds any more
SECONDS_TO_LOOK = 2.0  # between two looks at a lock that another holds
SECONDS_TO_BEAT = 15.0  # between two signs of life of who holds one
SECONDS_TO_DIE = 90.0  # without any, after which it is taken over


class SharedError(MendableError):
    """The shared store does not answer or refuses."""


class Shared:
    """The artifacts at one address."""

    def __init__(self, address: str) -> None:
        self.address = address.rstrip("/")

    @cached_property
    def _root(self) -> tuple[AbstractFileSystem, str]:
        """The address as file system and path; the first look at it imports what speaks to it."""
        from fsspec.core import url_to_fs
        from fsspec.utils import get_protocol

        options = {"auto_mkdir": True} if get_protocol(self.address) == "file" else {}
        with self._told():
            files, path = url_to_fs(self.address, **options)
        return files, path

    def kept(self, stage: str, key: str) -> Artifact | None:
        """Return an artifact as it is there, by its manifest; None where there is none."""
        files, root = self._root
        place = f"{root}/{stage}/{key}"
        try:
            with self._told(FileNotFoundError):
                text = files.cat_file(f"{place}/{MANIFEST}")
            found = Artifact(Path(place), unsealed(text))
        except (FileNotFoundError, ValueError):
            return None
        return found if found.key == key else None

    def fetch(self, store: Store, stage: str, key: str) -> Artifact | None:
        """Return the artifact of a key from the store here, or else brought there from this one; None without one.

        Raises CopyError, naming the file, when the copy is not what was made.
        """
        if (found := self.kept(stage, key)) is None:
            return None
        (files, _), place = self._root, str(found.path)

        def download(staged: Path) -> Path:
            names, inside = [*found.manifest["files"], MANIFEST], staged.resolve()
            if outside := [name for name in names if not (staged / name).resolve().is_relative_to(inside)]:
                raise CopyError(f"{MANIFEST} lists {outside[0]}")
            with self._told(CopyError):
                files.invalidate_cache()
                there = set(files.find(place))
                if gone := [name for name in names if f"{place}/{name}" not in there]:
                    raise CopyError(f"no {gone[0]}")  # not every client would name it
                names += [SIGNATURE] if f"{place}/{SIGNATURE}" in there else []
                files.get([f"{place}/{name}" for name in names], [str(staged / name) for name in names])
            return staged

        return store.restore(
            stage, key, download, f"{self.address}/{stage}/{key}, which is replaced once it is removed,"
        )

    def keep(self, artifact: Artifact) -> None:
        """Copy an artifact there, its manifest last, unless it is there."""
        if self.kept(artifact.stage, artifact.key):
            return
        files, root = self._root
        place = f"{root}/{artifact.stage}/{artifact.key}"
        names = [path.relative_to(artifact.path).as_posix() for path in artifact.path.rglob("*") if path.is_file()]
        names.remove(MANIFEST)
        with self._told():
            files.put([str(artifact.path / name) for name in names], [f"{place}/{name}" for name in names])
            files.pipe_file(f"{place}/{MANIFEST}", (artifact.path / MANIFEST).read_bytes())

    @contextmanager
    def alone(self, name: str, key: str) -> Iterator[None]:
        """Be the only one, on whatever machine, to make what has this key; wait for others, and say for whom.

        Locks are numbered objects, made only where there is none: who finds the last one released, or its holder dead,
        makes the next. A machine that slept for longer than SECONDS_TO_DIE may thus be at work beside its heir.
        They all go with work that ended well: its result is there, and who comes now finds it, alone or not.
        """
        (files, root), ended = self._root, Event()
        locks = (f"{root}/.locks/{key}/{number}" for number in count())
        lock = next(lock for lock in locks if self._taken(lock, name))
        owner = _owner()

        def beat() -> None:
            while not ended.wait(SECONDS_TO_BEAT):
                with suppress(SharedError), self._told():
                    files.pipe_file(lock, f"{owner}\n{time.time()}".encode())

        beating = Thread(target=beat, daemon=True)
        beating.start()
        is_made = False
        try:
            yield
            is_made = True
        finally:
            ended.set()
            beating.join()
            with suppress(SharedError), self._told():  # then it counts as dead after a while
                if is_made:
                    files.rm(lock.rpartition("/")[0], recursive=True)
                else:
                    files.pipe_file(lock, RELEASED)

    def _taken(self, lock: str, name: str) -> bool:
        """Whether this call made a lock; False once it is released, or its holder dead."""
        files, since = self._root[0], time.monotonic()
        seen: bytes | None = None
        with self._told():
            try:
                with files.open(lock, "xb") as file:
                    file.write(_owner().encode())
                return True
            except FileExistsError:
                pass
            except OSError:  # what a server has in its place (on S3 the write is If-None-Match: *)
                if not files.exists(lock):
                    raise
        while True:
            check_stop()
            try:
                with self._told(FileNotFoundError):
                    found: bytes = files.cat_file(lock)
            except FileNotFoundError:
                return False
            owner = found.decode(errors="replace").partition("\n")[0] or "another machine"
            if found == RELEASED:
                return False
            if found != seen:
                if seen is None:
                    say(f"{name}  waiting for {owner}, which makes it")
                seen, since = found, time.monotonic()
            elif time.monotonic() - since > SECONDS_TO_DIE:
                say(f"{name}  {owner} gave no sign of life for {SECONDS_TO_DIE:.0f} s: it is made here")
                return False
            time.sleep(SECONDS_TO_LOOK)

    @contextmanager
    def _told(self, *passed: type[Exception]) -> Iterator[None]:
        """Turn the errors of whatever client an address has, save those passed on, into SharedErrors."""
        try:
            yield
        except passed:
            raise
        except Exception as error:  # each client has errors of its own
            raise SharedError(
                f"{VARIABLE}={self.address}: {error}\nset what its client reads from the environment, or unset "
                f"{VARIABLE} to work without it; nothing that was computed is lost"
            ) from error


def shared() -> Shared | None:
    """Return the store that the environment names, if any."""
    return Shared(address) if (address := os.environ.get(VARIABLE)) else None


def _owner() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}, at work since {datetime.now().astimezone():%H:%M:%S %z}"
