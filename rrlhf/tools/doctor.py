"""`rrlhf doctor`: what is wrong with a project, the machine or the servers, and how to mend it."""

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import NamedTuple

from rrlhf.environment import ROOM, FullError, free_bytes
from rrlhf.hardware import cores
from rrlhf.located import MendableError
from rrlhf.locks import holder
from rrlhf.pipeline.params import load_params, profiles
from rrlhf.pipeline.tracking.server import address, database
from rrlhf.pipeline.tracking.unsynced import waiting
from rrlhf.tools.command_line import FAILED, AsJson, Profile
from rrlhf.tools.gc import leftovers
from rrlhf.tools.lineage.lookup import Lookup
from rrlhf.tools.running.status import FOLDERS


def doctor(profile: Profile = "default", as_json: AsJson = False) -> None:
    """Look at versions, rights, disks, locks, servers and what is half done; say how to mend each. Exit code 0 or 1."""
    found = [*examined(Path.cwd(), profile)]
    to_mend = sum(bool(one.mend) for one in found)
    if as_json:
        print(json.dumps([one._asdict() for one in found], indent=1))
    else:
        for one in found:
            print(f"to mend: {one.what}\n    {one.mend}" if one.mend else one.what)
        print(f"{len(found)} findings, {to_mend or 'nothing'} to mend")
    if to_mend:
        raise SystemExit(FAILED)


class Finding(NamedTuple):
    """Something that was looked at."""

    what: str
    mend: str = ""  # empty where nothing is wrong


def examined(root: Path, profile: str) -> Iterator[Finding]:
    """Yield all that is found; nothing is changed."""
    from rich.filesize import decimal

    yield from _versions()
    yield Finding(f"{cores()} processors, {os.environ.get('OMP_NUM_THREADS') or 'as many'} threads a process")
    places = [root]
    try:
        places.append(Path(tempfile.gettempdir()))
    except FileNotFoundError as error:
        yield Finding(str(error.strerror), "set TMPDIR to a folder that can be written and has room")
    for folder in places:
        yield Finding(f"{folder}: {decimal(free_bytes(folder))} free")
        if free_bytes(folder) < ROOM:
            yield Finding(str(FullError(folder, ROOM)), "make room; `rrlhf gc --dry-run` says what can go")
    for place in (root, *(root / name for name in FOLDERS)):
        if place.exists() and not os.access(place, os.W_OK):
            yield Finding(f"{place}: cannot be written", "give yourself the right, or copy the project elsewhere")
    if not shutil.which("git"):
        yield Finding("git is not installed: results do not tell the commit that they were made from")
    if not (root / ".dvc" / "config").is_file():
        yield Finding(f"{root / '.dvc' / 'config'}: not there", "copy the project with its hidden files")
    for name in profiles(root):
        try:
            load_params(root, name)
        except MendableError as error:
            yield Finding(f"profile {name}: {str(error).partition(chr(10))[0]}", "change the settings")
    for lock in sorted(root.glob("artifacts/.locks/*")) + sorted(root.glob(".rrlhf/*.lock")):
        if held := holder(lock):
            yield Finding(f"{lock.relative_to(root)} is held by {held}")
    yield from _services(root, profile)
    if unsynced := waiting(root):
        yield Finding(f"{len(unsynced)} runs that the tracking server does not know", "`rrlhf sync`")


def _versions() -> Iterator[Finding]:
    """Compare what is installed with what the package asks for."""
    from packaging.requirements import Requirement

    yield Finding(f"Python {sys.version.split()[0]}, {sys.platform}")
    try:
        wanted = [Requirement(text) for text in requires("rrlhf") or ()]
    except PackageNotFoundError:
        yield Finding("rrlhf is not installed", "pip install -e .")
        return
    for one in wanted:
        if one.marker is None or one.marker.evaluate({"extra": ""}):
            try:
                found = version(one.name)
            except PackageNotFoundError:
                found = ""
            if not found or not one.specifier.contains(found, prereleases=True):
                yield Finding(f"{one}: found {found or 'none'}", f"pip install '{one}'")


def _services(root: Path, profile: str) -> Iterator[Finding]:
    """Ask the servers, and what they know of the results here."""
    import requests

    from rrlhf.redact import redacted

    if prefect := os.environ.get("PREFECT_API_URL"):
        try:
            requests.get(f"{prefect.rstrip('/')}/health", timeout=5).raise_for_status()
        except requests.RequestException as error:
            yield Finding(redacted(f"Prefect's server {prefect}: {error}"), "start it, or unset PREFECT_API_URL")
    if (file := database(root)) and not file.exists():
        yield Finding(f"{file}: not there; the first run makes it")
        return
    try:
        lookup = Lookup(root, profile, load_params(root, profile))
        for one in lookup.tracker.registrations():
            if not one.complete:
                told = f"{one.name}/{one.version}" if one.name else f"the run of {one.key[:8]}"
                yield Finding(f"{told} in MLflow is half registered", "the next `rrlhf run` of its settings ends that")
        yield Finding(redacted(f"MLflow answers at {address(root)}"))
        if found := leftovers(lookup):
            size = sum(one.size for one in found)
            yield Finding(f"{len(found)} files and folders with {size:,} bytes can go: `rrlhf gc --dry-run`")
    except MendableError as error:
        what, _, mend = str(error).partition("\n")
        yield Finding(what, mend or "mend this first")
