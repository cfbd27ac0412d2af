"""DVC, the owner of the data sets: what it prepared, it versions, caches and brings back.

The data stage of a profile is declared in dvc.yaml and depends on one small file, its key document, so the rules for
"what changed" are those of every other stage. An override of a data parameter gets a folder and a dvc.yaml of its
own: no data set is ever overwritten by another or left without a version. Only this module imports dvc, and only
when there is something to do: whether a data set is there and unchanged is read from dvc.lock and the files.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path
from shlex import quote
from typing import Any, NamedTuple

import yaml

from rrlhf.files import clear, write, write_if_new
from rrlhf.located import ParamsError
from rrlhf.locks import holder
from rrlhf.memo import Memo
from rrlhf.pipeline.artifacts import Store, TamperedError
from rrlhf.pipeline.graph import DATA, Node, nodes
from rrlhf.pipeline.keys import Document, canonical, key_digest
from rrlhf.pipeline.params import load_params
from rrlhf.pipeline.versioning.records import (
    broken_run_records,
    cached,
    copy_faults,
    declared_in,
    folder_digest,
    keep_document,
    kept_document,
    listing,
    lock_entry,
    locks,
    md5,
    run_records,
)
from rrlhf.progress import say
from rrlhf.stopping import Interrupted, check_stop
from rrlhf.types import Dataset, Json

SECONDS_TO_LOCK = 60.0  # DVC locks its records for moments only, so a longer wait means that something is wrong
RWLOCK = Path(".dvc", "tmp", "rwlock")  # where DVC writes which process works on which files


class Place(NamedTuple):
    """Where a data set lies, and the DVC stage that makes it."""

    name: str
    key: Path
    data: Path
    project: Path  # the dvc.yaml
    stage: str  # its name in there

    @property
    def address(self) -> str:
        """The stage, as DVC is asked for it."""
        return f"{self.project}:{self.stage}"


class PrepareError(RuntimeError):
    """The data stage failed; its own output says why."""


class BusyError(RuntimeError):
    """DVC's locks cannot be had: another command holds them, or their file is broken."""


def place_of(root: Path, profile: str, node: Node, document: Document) -> Place:
    """Return the place of a profile's data set, or of the variant that overrides make of it.

    Raises ParamsError where DVC could make none.
    """
    if not (root / ".dvc" / "config").is_file():
        raise ParamsError(
            f"{root / '.dvc' / 'config'}: no such file, without which DVC makes no data set: copy the project with its "
            "hidden files"
        )
    name, stage = profile, f"prepare@{profile}"
    declared = declared_in(root, profile)
    if declared is None or nodes(load_params(root, profile))[0].settings != node.settings:
        name = f"{profile}-{key_digest(document)[:8]}"
        declared, stage = root / "data" / "variants" / name / "dvc.yaml", "prepare"
    return Place(name, root / "data" / f"{name}.key.json", root / "data" / name, declared, stage)


def write_key(path: Path, document: Document) -> None:
    """Write a key document as the file that a data stage depends on."""
    write_if_new(path, canonical(document))
    keep_document(path.parent, document)


def prepared(root: Path, place: Place, document: Document) -> Dataset | None:
    """Return the data set if it is there and made by this key; run nothing.

    Raises TamperedError when a file, or DVC's record of it, is not what was written.
    """
    entry = lock_entry(root, place.project, place.stage, place.data)
    if not entry or not place.data.exists() or entry["deps"][0]["md5"] != md5(canonical(document).encode()):
        return None
    expected = entry["outs"][0]["md5"]
    _check(root, place, expected)
    return Dataset(place.name, place.data, f"md5:{expected}")


def restorable(root: Path, place: Place, document: Document) -> Dataset | None:
    """Return the data set that DVC's run cache holds for this key: DVC brings it back instead of making it."""
    wanted = md5(canonical(document).encode())
    for record in run_records(root):
        if record.document_md5 == wanted and record.name == place.name:
            files = listing(root, record.digest)
            if files and all(cached(root, digest).exists() for digest in files.values()):
                return Dataset(place.name, place.data, record.digest)
    return None


def prepare_dataset(root: Path, place: Place, document: Document) -> Dataset:
    """Have DVC make the data set or bring it back, and return it with the digest of its version."""
    with Store(root).locked(f"data-{place.name}"):
        write_key(place.key, document)
        _declare(place)
        _check_cache(root, md5(canonical(document).encode()))
        say(f"{DATA}  begins: DVC makes {place.data.relative_to(root)}, or brings it back")
        _reproduce(root, place)
        dataset = prepared(root, place, document)
    if dataset is None:
        raise PrepareError(f"DVC finished without {place.data}; `dvc repro {place.address}` may tell more")
    return dataset


def earlier_dataset(root: Path, fits: Callable[[Document], bool]) -> Dataset | None:
    """Return a version that lies here, checked, and was made by a key document that fits."""
    for record in locks(root):
        folder, document = root / "data" / record.name, kept_document(root, record.document_md5)
        if document and fits(document) and folder.is_dir():
            if problem := fault(root, folder, record.digest.removeprefix("md5:")):
                raise TamperedError(problem)
            return Dataset(record.name, folder, record.digest)
    return None


def accept_dataset(root: Path, place: Place, old: Dataset, document: Document, accepted: Mapping[str, Json]) -> None:
    """Have DVC record an earlier version as made by this key document; a variant has its folder by its key."""
    with Store(root).locked(f"data-{place.name}"):
        write_key(place.key, document)
        if old.path != place.data:
            shutil.copytree(old.path, clear(place.data), dirs_exist_ok=True)
            _declare(place)
        write(_acceptance(root, document), json.dumps(accepted, indent=1) + "\n")
        _when_free(root, SECONDS_TO_LOCK, lambda repository: repository.commit(place.address, force=True))


def accepted_for(root: Path, document: Document) -> dict[str, Any] | None:
    """Return what was written when a data set was accepted for this key document."""
    path = _acceptance(root, document)
    found: dict[str, Any] | None = json.loads(path.read_bytes()) if path.is_file() else None
    return found


def _acceptance(root: Path, document: Document) -> Path:
    return root / "data" / "keys" / f"{md5(canonical(document).encode())}.accepted"


def _check_cache(root: Path, document: str) -> None:
    """Compare what DVC would bring back for a key document with its digests: DVC trusts time stamps."""
    broken = [f"{path}: not the record that its name says" for path in broken_run_records(root)]
    for record in run_records(root):
        if record.document_md5 == document:
            lost = "found no file"  # DVC sees that itself, and makes the data set again
            broken += [problem for problem in copy_faults(root, record.digest) if not problem.endswith(lost)]
    if broken:
        path = broken[0].partition(":")[0].partition(",")[0]
        raise TamperedError(f"{broken[0]}\nto have the data set made again: rm {quote(path)}")


def _declare(place: Place) -> None:
    """Write the dvc.yaml of a variant; those of profiles are there."""
    if place.stage == "prepare":
        place.project.parent.mkdir(parents=True, exist_ok=True)
        place.project.write_text(declaration(place.name), encoding="utf-8")


def declaration(name: str) -> str:
    """Return the dvc.yaml of a variant."""
    key, data = f"data/{name}.key.json", f"data/{name}"
    stage = {
        "cmd": f"python -m rrlhf prepare {key} {data}",
        "wdir": "../../..",  # the project, to which paths in params.yaml are relative
        "deps": [key],
        "outs": [data],
    }
    return yaml.safe_dump({"stages": {"prepare": stage}}, sort_keys=False)


def _reproduce(root: Path, place: Place) -> None:
    """Let DVC decide: nothing to do, bring the version back, or run the command."""
    from dvc.exceptions import DvcException
    from dvc.stage.exceptions import StageCmdFailedError

    try:
        _when_free(root, SECONDS_TO_LOCK, lambda repository: repository.reproduce(place.address, single_item=True))
    except DvcException as error:
        cause = _cause(error)
        if any(ending in str(cause) for ending in ("exited with 130", "exited with -2")):
            raise Interrupted from None
        if isinstance(cause, StageCmdFailedError):
            raise PrepareError(f"preparing {place.name} failed; the lines above say why") from error
        raise PrepareError(f"DVC could not prepare {place.name}: {cause}") from error


def _when_free(root: Path, seconds: float, work: Callable[[Any], object]) -> None:
    """Do what needs DVC's locks, waiting for whoever holds them.

    Raises BusyError that names them after so many seconds, and at once where the file that says it is broken.
    """
    from dvc.exceptions import DvcException
    from dvc.lock import LockError
    from dvc.rwlock import RWLockFileCorruptedError, RWLockFileFormatError

    give_up, told = time.monotonic() + seconds, False
    while True:
        check_stop()
        try:
            with _opened(root) as repository:
                work(repository)
            return
        except (DvcException, UnicodeDecodeError) as error:
            cause = _cause(error)
            if isinstance(cause, RWLockFileCorruptedError | RWLockFileFormatError | UnicodeDecodeError):
                path = root / RWLOCK
                raise BusyError(
                    f"{path}: half written, by a DVC command that was killed or had no room on the disk; once no other "
                    f"runs here: rm {quote(str(path))}"
                ) from None
            if not isinstance(cause, LockError):
                raise
            if time.monotonic() > give_up:
                raise BusyError(f"gave up after {seconds:.0f} s: {_holders(root, cause)}") from None
            if not told:
                say(f"waiting up to {seconds:.0f} s: {_holders(root, cause)}")
            told = True
            time.sleep(0.5)


def _cause(error: Exception) -> BaseException:
    """Return the error that ended a stage, which DVC wraps."""
    from dvc.exceptions import ReproductionError

    return (error.__cause__ if isinstance(error, ReproductionError) else None) or error


def _holders(root: Path, error: BaseException) -> str:
    """Say who holds DVC's locks: its error tells it of what stages read and write, the lock itself of the rest."""
    import psutil

    if blockers := re.findall(r"\(PID (\d+)\): (.*)", str(error)):
        lock = quote(str(root / RWLOCK))
        who = ", ".join(f"process {pid} ({command})" for pid, command in dict.fromkeys(blockers))
        return f"DVC's files are in use by {who}; if that is no DVC command, a killed one left it: rm {lock}"
    for name in ("lock", "rwlock.lock"):
        if (pid := holder(root / RWLOCK.with_name(name))) and pid.isdecimal():
            with suppress(psutil.Error):
                return f"DVC's lock is held by process {pid} ({' '.join(psutil.Process(int(pid)).cmdline())})"
    return f"DVC's lock is held by another command ({root / RWLOCK.with_name('lock')})"


@contextmanager
def _opened(root: Path) -> Iterator[Any]:
    """Open the project in DVC, where only errors are told; without git, which ignores the variants in data/."""
    from dvc.repo import Repo

    logging.getLogger("dvc").setLevel(logging.ERROR)
    with redirect_stdout(sys.stderr), Repo(str(root), config={"core": {"no_scm": True}}) as repository:
        yield repository


def _check(root: Path, place: Place, expected: str) -> None:
    """Compare the files with the digest that DVC recorded: DVC itself trusts size and time stamp."""
    problem = fault(root, place.data, expected)
    if problem:
        raise TamperedError(
            f"{problem}\nbuilt on it: {Store(root).users(f'md5:{expected}')}\n"
            f"to have it brought back or made again: rm -r {quote(str(place.data))}"
        )


def fault(root: Path, folder: Path, expected: str, *, deep: bool = False) -> str | None:
    """Say which file of a data set is not what DVC recorded, or None; `expected` is the recorded digest.

    deep: read every byte, also of files whose size, times and inode are those of an earlier look.
    """
    found = digests(root, folder, deep=deep)
    if folder_digest(found) == expected:
        return None
    recorded = listing(root, expected)
    if not recorded:
        return f"{folder}: expected md5 {expected}, found {folder_digest(found)}; DVC's list of its files is gone"
    changed = min(name for name, _ in found.items() ^ recorded.items())
    expected, now = recorded.get(changed, "no such file"), found.get(changed, "no file")
    return f"{folder / changed}: not what DVC recorded, expected md5 {expected}, found {now}"


def digests(root: Path, folder: Path, *, deep: bool = False) -> dict[str, str]:
    """Return the md5 of every file in a folder, as DVC has it; see `fault`."""
    memo = Memo(root / ".rrlhf" / "md5.json", "md5")
    if deep:
        memo.forget(folder)
    found = {path.relative_to(folder).as_posix(): memo.digest(path) for path in _files(folder)}
    memo.save()
    return found


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.is_file())
