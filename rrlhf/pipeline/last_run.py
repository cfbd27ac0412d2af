"""How each profile's last run went, for `rrlhf status`: a small file per profile, written at its start and end."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from rrlhf.files import write
from rrlhf.pipeline.partial import Part

FOLDER = Path(".rrlhf", "last")


@contextmanager
def noted(root: Path, profile: str, overrides: Mapping[str, Any], part: Part) -> Iterator[list[str]]:
    """Note a run's start and how it ended; yield the list in which it is to name the nodes that computed.

    What a run took is counted from the start of its process.
    """
    before, ran = last_run(root, profile) or {}, list[str]()
    start_up = 0.0 if before.get("process") == os.getpid() else _age_of_process()  # a process may run several
    began = time.monotonic() - start_up
    about = {
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        "process": os.getpid(),
        "overrides": dict(overrides),
        "part": {name: [*names] for name, names in part._asdict().items() if names},
        "start_up": before.get("start_up"),  # of the last that computed: one with nothing to do starts less
    }
    note(root, profile, about | {"status": "running"})
    status = "failed"
    try:
        yield ran
        status = "finished"
    except KeyboardInterrupt:
        status = "interrupted"
        raise
    finally:
        about |= {"start_up": round(start_up, 1)} if ran and start_up else {}
        note(root, profile, about | {"status": status, "seconds": round(time.monotonic() - began, 1), "ran": ran})


def note_end(root: Path, profile: str) -> None:
    """Note that the process of a profile's last run ends now: stopping its services counts too."""
    found = last_run(root, profile)
    if found and found["process"] == os.getpid() and "seconds" in found:
        note(root, profile, found | {"seconds": max(found["seconds"], round(_age_of_process(), 1))})


def note(root: Path, profile: str, content: Mapping[str, Any]) -> None:
    """Write what is known of a profile's last run."""
    write(root / FOLDER / f"{profile}.json", json.dumps(content, indent=1))


def _age_of_process() -> float:
    """Return for how many seconds this process has run; 0 where the system does not tell."""
    try:
        ticks = Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19]
        up = Path("/proc/uptime").read_text(encoding="utf-8").split()[0]
    except OSError:
        return 0.0
    return float(up) - int(ticks) / os.sysconf("SC_CLK_TCK")


def last_run(root: Path, profile: str) -> dict[str, Any] | None:
    """Return what was noted of a profile's last run; None when there was none."""
    try:
        found: dict[str, Any] = json.loads((root / FOLDER / f"{profile}.json").read_bytes())
    except (OSError, ValueError):
        return None
    return found
