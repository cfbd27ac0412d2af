"""What a policy wrote as it trained: a few prompts' responses at the first, the middle and the last rollout."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from rrlhf.judging.evaluation import Excerpt
from rrlhf.types import Message

FILE = "samples.json"
PROMPTS = 3


class RolloutResponse(NamedTuple):
    """One response of a rollout, kept so that other judges can read it later."""

    update: int
    prompt: int  # row of the ppo table
    response: str
    finished: bool
    kl: float  # log(pi / pi_ref) of the response, nats
    proxy: float
    heads: list[float]
    sigma: float  # mean standard deviation of the heads' scores


def excerpts(kept: Sequence[RolloutResponse], asked: Sequence[list[Message]]) -> list[Excerpt]:
    """Pick from responses in order of updates, those of one prompt side by side.

    Prompts are the first that come up often enough, so nothing is chosen for what it says. Where none comes up twice,
    the first responses of three rollouts have to do, each to a prompt of its own.
    """
    times: dict[int, dict[int, RolloutResponse]] = {}  # by prompt, then by update
    for row in kept:
        times.setdefault(row.prompt, {}).setdefault(row.update, row)
    again = [list(of_prompt.values()) for of_prompt in times.values() if len(of_prompt) > 1]
    if again:
        often = sorted(again, key=lambda rows: -min(len(rows), 3))
        chosen = [row for rows in often[:PROMPTS] for row in _first_middle_last(rows)]
    else:
        chosen = _first_middle_last(list({row.update: row for row in reversed(kept)}.values())[::-1])
    return [_excerpt(row, asked[row.prompt][-1]["content"]) for row in chosen]


def write_excerpts(found: Sequence[Excerpt], folder: Path) -> None:
    """Write what no judge has read yet into a policy's folder."""
    told = [{name: value for name, value in vars(one).items() if name != "gold"} for one in found]
    (folder / FILE).write_text(json.dumps(told, indent=1, ensure_ascii=False), encoding="utf-8")


def read_excerpts(folder: Path) -> list[Excerpt]:
    """Read the excerpts of a policy's training; none where it was not trained on rollouts."""
    path = folder / FILE
    return [Excerpt(**row) for row in json.loads(path.read_bytes())] if path.is_file() else []


def _first_middle_last(rows: Sequence[RolloutResponse]) -> list[RolloutResponse]:
    return [rows[i] for i in sorted({0, len(rows) // 2, len(rows) - 1}) if rows]


def _excerpt(row: RolloutResponse, prompt: str) -> Excerpt:
    heads = [_finite(score) for score in row.heads]
    return Excerpt(
        row.update, row.prompt, prompt, row.response, row.finished, _finite(row.kl), _finite(row.proxy), heads
    )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
