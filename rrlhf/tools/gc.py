"""`rrlhf gc`: what nothing needs any more, and its removal.

Needed is what a registered model was made from, what the present settings of a profile or those of its last run would
reuse, what the tracking server is still to be told of, and a comparison of nothing but such models. Whoever wants to
be rid of a model deletes its version in MLflow first.
"""

import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Annotated, NamedTuple

import typer

from rrlhf.located import MendableError, ParamsError
from rrlhf.locks import holder, is_alive, locked
from rrlhf.pipeline.params import profiles
from rrlhf.pipeline.plan import Project
from rrlhf.pipeline.stages import spec_of
from rrlhf.pipeline.tracking.server import database
from rrlhf.pipeline.tracking.unsynced import results
from rrlhf.tools.command_line import USAGE, Profile, end, opened
from rrlhf.tools.lineage.lookup import Lookup
from rrlhf.tools.running.status import last_run

ASIDE = ("copy-", "restore-", "gc-")  # what was moved into the staging folder; no run goes on from it
HALF_WRITTEN = re.compile(r"\..+\.(\d+)")  # of `rrlhf.files.write`, with the number of the process


def gc(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would go, and remove nothing.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Remove without asking.")] = False,
    profile: Profile = "default",
) -> None:
    """Remove what no registered model and no profile needs any more, and what interrupted runs left.

    To be rid of a model, delete its version in MLflow first. While a run is at work nothing is removed.
    """
    from rich.filesize import decimal

    lookup = opened(profile)
    found = leftovers(lookup)
    for one in found:
        print(f"{one.size:>15,}  {os.path.relpath(one.path.resolve(), lookup.root.resolve())}  {one.what}")
    total = f"{len(found)} files and folders, {decimal(sum(one.size for one in found))}"
    if dry_run or not found:
        print(f"{total} would go" if found else "nothing can go")
        return
    if not yes and not sys.stdin.isatty():
        end(USAGE, f"{total}: to remove them without being asked, add --yes")
    if yes or typer.confirm(f"remove {total}?"):
        remove(lookup, found)
        print(f"removed {total}")


class BusyError(MendableError):
    """Something is at work in the project."""


class Leftover(NamedTuple):
    """A file or folder that can go."""

    path: Path
    what: str
    size: int  # bytes that its removal frees: what has a name elsewhere, as an accepted result has, frees nothing
    model: str = ""  # the id of MLflow's logged model that it belongs to


def leftovers(lookup: Lookup) -> list[Leftover]:
    """Return what can go. Raises ParamsError or TamperedError where it cannot be told what a profile needs."""
    store, keys = lookup.store, {*_current(lookup.root)}
    registered = {(version.digest, version.key) for version in lookup.versions}
    roots = [each for each in lookup.graph.products if each.key in keys or (each.digest, each.key) in registered]
    needed = {*lookup.graph.up(*roots)}
    needed |= {
        made
        for made in lookup.graph.products
        if spec_of(made.stage).reads and not spec_of(made.stage).model  # a comparison
        if {link.source for link in lookup.graph.sources[made]} <= needed
    }
    folders = {store.folder(each.stage, each.key) for each in needed if each.key}
    found = [
        (made.path, f"{made.name}, made {made.manifest['created']}: no profile and no registered model needs it", "")
        for made in store.all()
        if made.path not in folders
    ]
    staged = sorted((store.root / ".staging").glob("*"))
    goes_on = [path for path in staged if path.name.rpartition("-")[2] in keys and not path.name.startswith(ASIDE)]
    found += [(path, "left by an interrupted run of other settings", "") for path in staged if path not in goes_on]
    locks = sorted((store.root / ".locks").glob("*"))
    found += [(path, "the lock of a run that was killed", "") for path in locks if not holder(path)]
    found += [(path, "another result of --force", "") for path in sorted((store.root / ".differing").glob("*"))]
    found += [(path, "left by an interrupted write", "") for path in _half_written(lookup.root)]
    found += [(path, "a backup of `rrlhf relocate`", "") for path in lookup.root.glob("mlflow.db.before-relocate-*")]
    if database(lookup.root):
        copies = lookup.tracker.models.unregistered()
        found += [(path, "MLflow's copy of a model without a version", model) for model, path in copies.items()]
    return [Leftover(path, what, _freed(path), model) for path, what, model in found]


def remove(lookup: Lookup, found: list[Leftover]) -> None:
    """Remove what can go; a result at once or not at all: it is renamed first. Raises BusyError while a run works."""
    for one in found:
        if busy := at_work(lookup.root):
            raise BusyError(f"{busy}: what it needs is not known before it ends; then give the same command again")
        if one.model:
            lookup.tracker.models.delete(one.model)
        if one.path.is_dir():
            lookup.store.forget(one.path)
            aside = lookup.store.root / ".staging" / f"gc-{one.path.name}"
            aside.parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(aside, ignore_errors=True)
            shutil.rmtree(one.path.rename(aside))
        elif one.path.parent.name == ".locks":
            with locked(one.path):
                pass  # it goes with its lock, which somebody may hold by now
        else:
            one.path.unlink(missing_ok=True)


def at_work(root: Path) -> str | None:
    """Return who works in a project, or None: a profile's run on this machine, or whoever holds a result's lock."""
    for profile in profiles(root):
        run = last_run(root, profile) or {}
        if run.get("status") == "running" and is_alive(int(run["process"])):
            return f"process {run['process']} runs profile {profile}"
    return next(filter(None, map(holder, sorted((root / "artifacts" / ".locks").glob("*")))), None)


def _current(root: Path) -> Iterator[str]:
    """Yield the keys that profiles need, as they are and as they last ran, and those of runs to be told of."""
    for profile in profiles(root):
        yield from (one.key for one in Project.opened(root, profile).plan() if one.key)
        if given := (last_run(root, profile) or {}).get("overrides"):
            with suppress(ParamsError):  # settings that are no more
                yield from (one.key for one in Project.opened(root, profile, given).plan() if one.key)
    yield from (made.key for made in results(root))


def _half_written(root: Path) -> Iterator[Path]:
    for path in sorted(root.glob(".rrlhf/**/.*")) + sorted(root.glob("reports/**/.*")):
        found = HALF_WRITTEN.fullmatch(path.name)
        if found and path.is_file() and not is_alive(int(found[1])):
            yield path


def _freed(path: Path) -> int:
    stats = [each.lstat() for each in [path, *path.rglob("*")] if not each.is_dir()]
    return sum(stat.st_size for stat in stats if stat.st_nlink == 1)
