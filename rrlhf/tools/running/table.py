"""A plan as the rows of a table, and how much of it is done, for pages that draw them."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from rrlhf.pipeline.plan import Planned, computing
from rrlhf.progress import in_words
from rrlhf.tools.pages import visible


def plan_rows(planned: Iterable[Planned]) -> list[dict[str, str]]:
    """Return a plan as the rows of a table."""
    return [
        {
            "node": visible(one.node),
            "action": one.action,
            "first reason": visible(one.reasons[0]) if one.reasons else "",
            "expected time": in_words(one.seconds) if one.seconds is not None else "",
        }
        for one in planned
    ]


def percent_done(planned: Iterable[Planned], done: Collection[str]) -> float:
    """Return how much of a plan's computing is done, 0 to 100, by expected times.

    A node that never ran counts like the mean of those that did. What is there already is no work.
    """
    work = computing(planned)
    known = [one.seconds for one in work if one.seconds is not None]
    usual = max(sum(known) / len(known), 1.0) if known else 1.0
    seconds = {one.node: usual if one.seconds is None else one.seconds for one in work}
    total = sum(seconds.values())
    return 100 * sum(seconds[name] for name in seconds if name in done) / total if total else 100.0
