"""What is there: every profile's state and last run, what runs now, what was interrupted, and the disk used."""

import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from rrlhf.files import CHECKPOINT, write
from rrlhf.located import ParamsError
from rrlhf.locks import holder, is_alive
from rrlhf.pipeline.artifacts import TamperedError
from rrlhf.pipeline.decide import Part
from rrlhf.pipeline.params import load_params, option, profiles
from rrlhf.pipeline.plan import Project
from rrlhf.pipeline.tracking.unsynced import waiting
from rrlhf.progress import in_words

FOLDERS = ("artifacts", ".dvc", "mlartifacts", "mlflow.db", "reports", ".rrlhf")

LAST = Path(".rrlhf", "last")  # a small file per profile, written at the start and end of its runs

Object = dict[str, Any]  # as JSON


def overview(root: Path) -> Object:
    """Return the state of a project's folder. Nothing is changed; a profile with mistakes is told, not raised.

    profiles: how each stands. running, interrupted: results that are being made, or were left half made, with the
    nodes of the present settings that they belong to, the process at work, and the steps from which the next run goes
    on. differing: results of --force that were not those stored. unsynced: how many runs the tracking server is still
    to be told of.
    """
    names: dict[str, list[str]] = {}
    states = [_profile(root, profile, names) for profile in profiles(root)]
    work = [*_works(root, names)]
    return {
        "profiles": states,
        "running": [each for each in work if each["holder"]],
        "interrupted": [each for each in work if not each["holder"] and each["steps"] is not None],
        "differing": sorted(str(path.relative_to(root)) for path in (root / "artifacts" / ".differing").glob("*")),
        "unsynced": len(waiting(root)),
        "disk_bytes": {name: size for name in FOLDERS if (size := _bytes(root / name))},
    }


def told(found: Object) -> Iterator[str]:
    """Yield an overview as lines."""
    from rich.filesize import decimal

    for state in found["profiles"]:
        to_do = "".join(f"; first to do: {node}, {what}" for node, what in [*state["to_do"].items()][:1])
        state_told = f"{len(state['reuse'])} of {state['nodes']} up to date{to_do}"
        yield f"{state['profile']}: {state['problem'] or state_told}"
        if run := state["last_run"]:
            killed = run["status"] == "running" and not is_alive(int(run["process"]))
            took = f" in {in_words(run['seconds'])}" if "seconds" in run else ""
            ran = f", ran {', '.join(run['ran'])}" if run.get("ran") else ""
            given = "".join(f" {option(key, value)}" for key, value in run["overrides"].items())
            yield f"  last run {run['started']}: {'killed' if killed else run['status']}{took}{ran}{given}"
    for work in (*found["running"], *found["interrupted"]):
        what = f"{', '.join(work['nodes']) or work['stage'] + ' of other settings'} {work['key'][:8]}"
        profile = work["nodes"][0].partition("/")[0] if work["nodes"] else ""
        again = f"; goes on with `rrlhf run --profile {profile}`" if profile else ""
        left = f"interrupted: {what}, saved after step {work['steps']}{again}"
        yield f"running: {what} ({work['holder']})" if work["holder"] else left
    for path in found["differing"]:
        yield f"computed again with another result than the stored one: {path}"
    if found["unsynced"]:
        yield f"unsynced: {found['unsynced']} runs; `rrlhf sync` tells the tracking server"
    yield f"disk: {', '.join(f'{name} {decimal(size)}' for name, size in found['disk_bytes'].items())}"


def _profile(root: Path, profile: str, names: dict[str, list[str]]) -> Object:
    """Return a profile's state; note which keys are its nodes' in `names`, in place."""
    problem, planned = None, []
    try:
        planned = Project(root, profile, load_params(root, profile)).plan()
    except (ParamsError, TamperedError) as error:
        problem = str(error).partition("\n")[0]
    for one in planned:
        if one.key:
            names.setdefault(one.key, []).append(f"{profile}/{one.node}")
    return {
        "profile": profile,
        "nodes": len(planned),
        "reuse": [one.node for one in planned if one.action == "reuse"],
        "to_do": {one.node: f"{one.action}: {one.reasons[0]}" for one in planned if one.action != "reuse"},
        "problem": problem,
        "last_run": last_run(root, profile),
    }


def _works(root: Path, names: Mapping[str, list[str]]) -> Iterator[Object]:
    """Yield what lies in the store's staging folder: a folder per result, STAGE-KEY."""
    for staged in sorted((root / "artifacts" / ".staging").glob("*-*")):
        stage, _, key = staged.name.rpartition("-")
        saved = [int(path.name) for path in (staged / CHECKPOINT).glob("[0-9]" * 8) if path.is_dir()]
        lock = root / "artifacts" / ".locks" / key
        yield {
            "stage": stage,
            "key": key,
            "nodes": names.get(key, []),
            "holder": holder(lock),
            "steps": max(saved, default=None),
        }


def _bytes(path: Path) -> int:
    """Return what a file or folder takes of the disk: what has two names, as an accepted result has, counts once."""
    found = [each.lstat() for each in [path, *path.rglob("*")] if each.exists()]
    return sum({(stat.st_dev, stat.st_ino): stat.st_size for stat in found}.values())


@contextmanager
def noted(root: Path, profile: str, overrides: Mapping[str, Any], part: Part) -> Iterator[list[str]]:
    """Note a run's start and how it ended; yield the list in which it is to name the nodes that computed."""
    ran, began = list[str](), time.monotonic()
    about = {
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        "process": os.getpid(),
        "overrides": dict(overrides),
        "part": {name: [*names] for name, names in part._asdict().items() if names},
    }
    file = root / LAST / f"{profile}.json"
    write(file, json.dumps(about | {"status": "running"}, indent=1))
    status = "failed"
    try:
        yield ran
        status = "finished"
    except KeyboardInterrupt:
        status = "interrupted"
        raise
    finally:
        ended = {"status": status, "seconds": round(time.monotonic() - began, 1), "ran": ran}
        write(file, json.dumps(about | ended, indent=1))


def last_run(root: Path, profile: str) -> dict[str, Any] | None:
    """Return what was noted of a profile's last run; None when there was none."""
    try:
        found: dict[str, Any] = json.loads((root / LAST / f"{profile}.json").read_bytes())
    except (OSError, ValueError):
        return None
    return found
