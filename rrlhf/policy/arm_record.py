"""What is kept with a policy of what it was paid."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from rrlhf.config import Arm, typed_arm

FILE = "arm.json"


class Scale(NamedTuple):
    """What an arm's aggregation gives for the reference responses; its reward is counted from there."""

    mean: float = 0.0
    std: float = 1.0


NO_SCALE = Scale()


def write_arm(folder: Path, arm: Arm, scale: Scale = NO_SCALE) -> None:
    """Write an arm's settings and the scale of its reward."""
    record = {"arm": arm.model_dump(mode="json"), "reference": scale._asdict()}
    (folder / FILE).write_text(json.dumps(record), encoding="utf-8")


def read_arm(folder: Path) -> tuple[Arm, Scale]:
    """Read what `write_arm` wrote."""
    record = json.loads((folder / FILE).read_bytes())
    return typed_arm(**record["arm"]), Scale(**record["reference"])
