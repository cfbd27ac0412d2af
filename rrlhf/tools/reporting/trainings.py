"""How the trainings behind a report went: what their health's detectors saw, and the curves in which it shows.

Read from the policies' folders when a report is written, since the histories hold times: they are part of no digest,
so no cached stage may read them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import NamedTuple

from rrlhf.pipeline.artifacts import Artifact
from rrlhf.policy.health import EVENTS, Event
from rrlhf.tools.reporting.differences import neighbour_means
from rrlhf.tools.reporting.plots import Chart, Look, data_uri, draw_line, draw_points, empty_chart
from rrlhf.types import Metrics


class Training(NamedTuple):
    """One arm's training."""

    events: list[Event]
    rows: list[Metrics]  # one for each rollout


PANELS = {
    "score": ("Score", "what the arm is paid, before KL"),
    "score_std": ("Spread of the score", "over the responses of a rollout"),
    "kl": ("KL", "nats per response to the start"),
    "entropy": ("Entropy", "nats per token"),
    "response_tokens": ("Length", "tokens per response"),
    "finished": ("Finished", "share of responses with an end"),
    "repetition": ("Repetition", "share of token pairs said before"),
    "sigma": ("Uncertainty", "standard deviation of the reward"),
    "spread": ("Spread of the heads", "how much they disagree"),
    "explained_variance": ("Explained variance", "of returns, by the value function"),
    "clip_fraction": ("Clip fraction", "share of tokens clipped"),
    "step_kl": ("KL of an update", "nats per token"),
    "gradient_norm": ("Gradient norm", "before clipping"),
}


def training(artifact: Artifact) -> Training | None:
    """Read a policy's training; None for one that no detector watched."""
    path = artifact.path / EVENTS
    if not path.is_file():
        return None
    return Training([Event(**event) for event in json.loads(path.read_bytes())], artifact.history())


def health(trainings: Mapping[str, Training]) -> str:
    """Say in one sentence which detectors fired, by arm; nothing where no arm was watched."""
    told = [
        f"{event.name} in {name} at rollout {event.step} ({event.action})"
        for name, training in trainings.items()
        for event in training.events
    ]
    if not trainings:
        return ""
    return f"Health: {'; '.join(told)}." if told else "Health: no detector fired in any training."


def charts(trainings: Mapping[str, Training], looks: Mapping[str, Look]) -> list[Chart]:
    """Draw every panel for which some arm has numbers, with a dotted line where a detector fired."""
    drawn = []
    for metric, (title, description) in PANELS.items():
        figure, axes = empty_chart("rollout", "", size=(2.9, 2.0))
        axes.ticklabel_format(useOffset=False)
        for name, training in trainings.items():
            known = {row["step"]: row[metric] for row in training.rows if math.isfinite(row.get(metric, math.nan))}
            draw_points(axes, [*known], [*known.values()], looks[name], size=3)
            draw_line(axes, neighbour_means([*known]), neighbour_means([*known.values()]), looks[name])
            for event in training.events:
                axes.axvline(event.step, color=looks[name].color, linewidth=1.4, linestyle=":")
        if any(metric in row for training in trainings.values() for row in training.rows):
            drawn.append(Chart(title, description, data_uri(figure)))
    return drawn
