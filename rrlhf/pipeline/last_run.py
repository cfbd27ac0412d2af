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
from rrlhf.pipeline.decide import Part

FOLDER = Path(".rrlhf", "last")


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
    note(root, profile, about | {"status": "running"})
    status = "failed"
    try:
        yield ran
        status = "finished"
    except KeyboardInterrupt:
        status = "interrupted"
        raise
    finally:
        note(root, profile, about | {"status": status, "seconds": round(time.monotonic() - began, 1), "ran": ran})


def note(root: Path, profile: str, content: Mapping[str, Any]) -> None:
    """Write what is known of a profile's last run."""
    write(root / FOLDER / f"{profile}.json", json.dumps(content, indent=1))


def last_run(root: Path, profile: str) -> dict[str, Any] | None:
    """Return what was noted of a profile's last run; None when there was none."""
    try:
        found: dict[str, Any] = json.loads((root / FOLDER / f"{profile}.json").read_bytes())
    except (OSError, ValueError):
        return None
    return found
