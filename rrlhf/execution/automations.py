"""Prefect's automations of automations.yaml, made or brought up to date: `python -m rrlhf.execution.automations`."""

from pathlib import Path
from typing import Any

import yaml
from prefect.automations import Automation

FILE = Path("automations.yaml")


def declare(file: Path) -> None:
    """Have every automation of a file on the server of PREFECT_API_URL, found by its name.

    One that is as declared stays as it is: an update would forget which runs it watches.
    """
    for declared in yaml.safe_load(file.read_text(encoding="utf-8"))["automations"]:
        wanted = Automation(**declared)
        try:
            found: Any = Automation.read(name=wanted.name)  # typed as if it were awaited
        except ValueError:
            wanted.create()
            continue
        wanted = wanted.model_copy(update={"id": found.id, "enabled": found.enabled})
        if wanted != found:
            wanted.update()


if __name__ == "__main__":
    declare(FILE)
