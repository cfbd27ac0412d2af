"""DVC, which versions the data sets: it keeps the folder of each, named by a small file beside it that git tracks.

A data set is an artifact like any other. `artifacts/prepare/KEY.dvc` is what `dvc add` leaves: with it DVC brings the
folder back from its cache or from a remote, also in a clone. Only this module imports dvc, and only when a data set
was made or is missing.
"""

from __future__ import annotations

import logging
import re
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import closing, redirect_stdout
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any, TypeVar

from rrlhf.files import clear, write_if_new
from rrlhf.located import MendableError
from rrlhf.pipeline.artifacts import MANIFEST, Artifact, TamperedError, read_artifact, unsealed
from rrlhf.pipeline.store import Store
from rrlhf.progress import say
from rrlhf.stopping import check_stop

if TYPE_CHECKING:
    from dvc.api import DVCFileSystem

SECONDS_TO_LOCK = 60.0  # DVC locks its records for moments only, so a longer wait means that something is wrong
RWLOCK = Path(".dvc", "tmp", "rwlock")  # where DVC writes which process works on which files
Found = TypeVar("Found")
NO_GIT = {"core": {"no_scm": True}}  # so that all of this works in a copy that git does not know, too


class DataError(MendableError):
    """DVC cannot do what it is asked; the message is its own."""


class BusyError(MendableError):
    """DVC's locks cannot be had: another command holds them, or their file is broken."""

    exit_code = 4


def pointer(folder: Path) -> Path:
    """Return the file by which DVC and git know a data set's folder."""
    return folder.with_name(f"{folder.name}.dvc")


def keep(root: Path, folder: Path) -> None:
    """Have DVC version a data set as it is now."""
    _when_free(root, lambda repository: repository.add(str(folder)))


def kept(store: Store, stage: str, key: str) -> Artifact | None:
    """Return a data set that is not here as DVC has it, by its manifest; None when it has none."""
    folder = store.folder(stage, key)
    if not pointer(folder).exists():
        return None
    manifest = _asked(store, folder, lambda files, path: files.read_bytes(f"{path}/{MANIFEST}"))
    try:
        found = Artifact(folder, unsealed(manifest)) if manifest else None
    except ValueError:
        return None
    return found if found and found.key == key else None


def bring_back(store: Store, stage: str, key: str) -> Artifact | None:
    """Return a data set from the store; where it is not there, from DVC's cache, or else its remote; None without one.

    Raises CopyError, naming the file, when that copy is not what was made.
    """
    return store.restore(stage, key, lambda staged: _copied(store, store.folder(stage, key), staged), "DVC's copy")


def fault(store: Store, artifact: Artifact) -> str | None:
    """Say what is wrong with DVC's copy of a data set, every byte of it, or None.

    Raises FileNotFoundError when it has none.
    """
    folder = artifact.path
    beside = folder.with_name(f"copy-{folder.name}")  # where DVC finds nothing else to read
    staged = clear(store.staging("copy", artifact.key))
    pointer(beside).write_text(pointer(folder).read_text(encoding="utf-8").replace(folder.name, beside.name))
    try:
        if (copied := _copied(store, beside, staged)) is None:
            raise FileNotFoundError(f"DVC keeps no files of {folder}")
        problem = store.fault(read_artifact(copied), deep=True)
    except (DataError, TamperedError) as error:
        problem = str(error).partition("\n")[0]
    finally:
        pointer(beside).unlink()
        shutil.rmtree(staged)
    return f"DVC's copy of {folder}: {problem}" if problem else None


def _copied(store: Store, folder: Path, staged: Path) -> Path | None:
    """Copy what DVC has of a folder, from its cache or else its remote, into an empty one; None when it has nothing."""
    if not pointer(folder).exists():
        return None

    def copy(files: DVCFileSystem, path: str) -> Path:
        files.get(path, str(staged), recursive=True)
        return staged / folder.name

    return _asked(store, folder, copy)


def follow_git(root: Path) -> None:
    """Have DVC compare commits (`dvc metrics diff`) in a project under git, by .dvc/config.local.

    .dvc/config says no_scm = true, without which no DVC command works in a copy that git does not know. A no_scm = true
    in config.local is the user's own and stays.
    """
    path = root / ".dvc" / "config.local"
    before = path.read_text(encoding="utf-8") if path.is_file() else ""
    found = re.search(r"^[ \t]*no_scm[ \t]*=[ \t]*(\w+)[ \t]*\n?", before, re.MULTILINE)
    section, with_git = "[core]\n", "[core]\n    no_scm = false\n"
    if is_under_git(root) and found is None:
        after = before.replace(section, with_git, 1) if section in before else before + with_git
    elif not is_under_git(root) and found and found[1].lower() == "false":
        after = before[: found.start()] + before[found.end() :]
    else:
        return
    if path.parent.is_dir():
        write_if_new(path, after)


def is_under_git(root: Path) -> bool:
    """Whether the folder or one above it is a working tree of git."""
    return any((folder / ".git").exists() for folder in (root, *root.parents))


def _asked(store: Store, folder: Path, ask: Callable[[DVCFileSystem, str], Found]) -> Found | None:
    """Ask for a folder among the files that DVC has, here or not; None when it has them nowhere. Needs no lock."""
    from dvc.api import DVCFileSystem
    from dvc.exceptions import DvcException
    from dvc_data.index import DataIndexDirError

    root = store.root.parent
    logging.getLogger("dvc").setLevel(logging.ERROR)
    try:
        with closing(DVCFileSystem(str(root), config=NO_GIT)) as files:
            return ask(files, folder.relative_to(root).as_posix())
    except FileNotFoundError:
        return None
    except (DvcException, DataIndexDirError) as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return None
        raise DataError(f"DVC: {error}{f': {error.__cause__}' if error.__cause__ else ''}") from error


def _when_free(root: Path, work: Callable[[Any], object]) -> None:
    """Do what needs DVC's locks, waiting for whoever holds them.

    Raises BusyError after SECONDS_TO_LOCK, and at once where the file that names them is broken.
    """
    from dvc.exceptions import DvcException
    from dvc.lock import LockError
    from dvc.repo import Repo
    from dvc.rwlock import RWLockFileCorruptedError, RWLockFileFormatError

    logging.getLogger("dvc").setLevel(logging.ERROR)
    give_up, told = time.monotonic() + SECONDS_TO_LOCK, False
    while True:
        check_stop()
        try:
            with redirect_stdout(sys.stderr), Repo(str(root), config=NO_GIT) as repository:
                work(repository)
            return
        except (RWLockFileCorruptedError, RWLockFileFormatError, UnicodeDecodeError):
            path = root / RWLOCK
            raise BusyError(
                f"{path}: half written, by a DVC command that was killed or had no room on the disk; once no other "
                f"runs here: rm {quote(str(path))}"
            ) from None
        except LockError as error:
            if time.monotonic() > give_up:
                raise BusyError(f"DVC, after {SECONDS_TO_LOCK:.0f} s: {error}") from None
            if not told:
                say(f"waiting up to {SECONDS_TO_LOCK:.0f} s for another DVC command: {error}")
            told = True
            time.sleep(0.5)
        except DvcException as error:
            raise DataError(f"DVC: {error}") from error
