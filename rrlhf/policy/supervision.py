"""What stands around a training loop, so that the loop is nothing but its algorithm.

A loop yields a row of metrics after every step. From outside, it is begun where an interrupted one was saved, it is
saved now and then, and PPO's is watched: where its health fails, it begins again from the last good checkpoint.
"""

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NoReturn

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, gather_object

from rrlhf.config import Health
from rrlhf.policy.checkpoint import Checkpoints, State
from rrlhf.policy.excerpts import RolloutResponse, excerpts, write_excerpts
from rrlhf.policy.health import (
    DIVERGED,
    EVENTS,
    MARK,
    NONFINITE,
    Event,
    Finding,
    findings,
    hacking_suspected,
    is_healthy,
)
from rrlhf.policy.learner import Learner, Trained
from rrlhf.progress import is_main_process, say
from rrlhf.stopping import Interrupted, stop
from rrlhf.types import Message, Metrics

SECONDS_BETWEEN_CHECKPOINTS = 600.0  # what a kill costs at most; a run that is asked to stop saves its last step
ADVICE = "a smaller ppo.learning_rate or a larger ppo.kl_weight may help; docs/metrics.md tells what each name means"


def shuffled(rows: int, size: int, epochs: int, seed: int) -> list[list[int]]:
    """Return the batches of all epochs; each epoch has all rows in an order of its own, its last batch the rest."""
    generator = torch.Generator().manual_seed(seed)
    orders = (torch.randperm(rows, generator=generator) for _ in range(epochs))
    return [batch.tolist() for order in orders for batch in order.split(size)]


def resumable(
    train: Callable[[int], Iterator[Metrics]], trained: Trained, checkpoints: Checkpoints, label: str
) -> Iterator[Metrics]:
    """Yield the rows of a training, those before an interruption once more.

    train: the training from its step `first` on; a step may depend on nothing but its number and what `trained` holds.
    """
    saved = checkpoints.newest()
    rows: list[Metrics] = saved.own["rows"] if saved else []
    if saved:
        trained.restore(saved)
    yield from [*rows]
    since = time.monotonic()
    for row in train(len(rows)):
        rows.append(row)
        yield row
        if stop.is_set():
            _save_and_stop(trained, partial(trained.state, rows=rows), checkpoints, len(rows), label)
        if _agreed(trained.engine, time.monotonic() - since > SECONDS_BETWEEN_CHECKPOINTS):
            checkpoints.save(len(rows), trained.state(rows=rows))
            since = time.monotonic()


@dataclass
class History:
    """All that a training by PPO has told so far; what a rollback took back stays in it."""

    label: str  # begins what is said on the terminal
    rows: list[Metrics] = field(default_factory=list)  # one for each rollout
    responses: list[RolloutResponse] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    rollbacks: list[int] = field(default_factory=list)  # the rows after which there was one
    diverged: str = ""  # why it ended for good


def resumed(learner: Learner, checkpoints: Checkpoints, label: str) -> History:
    """Put the learner where it was saved last, and return what was told by then; without that, save where it begins."""
    saved = checkpoints.newest()
    if saved is None:
        history = History(label)
        _save(learner, history, checkpoints, good=True)  # what a rollback before the first checkpoint returns to
        return history
    learner.resume(saved)
    told = saved.own["history"]
    responses = [RolloutResponse(*row) for own in saved.owns for row in own["history"]["responses"]]
    events = [Event(*row) for row in told["events"]]
    return History(**told | {"responses": responses, "events": events})


def supervised(
    train: Callable[[], Iterator[tuple[Metrics, list[RolloutResponse]]]],
    learner: Learner,
    history: History,
    checkpoints: Checkpoints,
    health: Health,
) -> Iterator[Metrics]:
    """Yield the rows of a training by PPO with what its health finds in them, those before an interruption once more.

    train: the training from where the learner is. A rollback puts the learner back to the last good checkpoint, lowers
    its learning rate and begins the training again; after the last of them the rows end, and `history.diverged` says
    why.
    """
    yield from [*history.rows]
    begun = -1  # rollbacks before the training that is under way
    while len(history.rollbacks) > begun and not history.diverged:
        begun = len(history.rollbacks)
        for row, responses in train():
            history.rows.append(row)
            history.responses += responses
            _look(learner, history, checkpoints, health)
            yield row
            if stop.is_set():
                state = partial(_state, learner, history)
                _save_and_stop(learner, state, checkpoints, len(history.rows), history.label)
            if len(history.rollbacks) > begun or history.diverged:
                break


def write_history(
    history: History, engine: Accelerator, messages: Sequence[list[Message]], out: Path
) -> list[RolloutResponse]:
    """Write what health saw and some of what the policy wrote; return all processes' responses by update."""
    responses = sorted(gather_object(history.responses), key=lambda row: row.update)
    if engine.is_main_process:
        events = [event._asdict() for event in history.events]
        (out / EVENTS).write_text(json.dumps(events, indent=1, ensure_ascii=False), encoding="utf-8")
        write_excerpts(excerpts(responses, messages), out)
    return responses


def _look(learner: Learner, history: History, checkpoints: Checkpoints, health: Health) -> None:
    """Act on the last row, in which marks are left. Only what is healthy becomes a good checkpoint."""
    rows, row = history.rows, history.rows[-1]
    start = next((row for row in rows if NONFINITE not in row), row)
    found = findings(rows[max([0, *history.rollbacks]) :], start, health)
    row |= {f"{MARK}{finding.name}": 1.0 for finding in found}
    if found:
        _roll_back(learner, history, checkpoints, found, health)
    warning = None if found else hacking_suspected(rows)
    if warning and all(event.name != warning.name for event in history.events):
        row[f"{MARK}{warning.name}"] = 1.0
        _tell(history, [warning], "warned")
    for name in [name for name, value in row.items() if not math.isfinite(value)]:
        del row[name]  # no log can hold it
    if not history.diverged and learner.update % health.checkpoint_every == 0:
        _save(learner, history, checkpoints, good=not found and is_healthy(row, start, health))


def _roll_back(
    learner: Learner, history: History, checkpoints: Checkpoints, found: list[Finding], health: Health
) -> None:
    tries, row = len(history.rollbacks), history.rows[-1]
    saved = checkpoints.newest(good=True) if tries < health.rollbacks else None
    if saved is None:
        row[DIVERGED] = 1.0
        what = "; ".join(f"{finding.name} ({finding.detail})" for finding in found)
        tried = f" after {tries} rollback{'s' if tries > 1 else ''}" if tries else ""
        _tell(history, found, "ended as DIVERGED")
        history.diverged = (
            f"DIVERGED at step {row['step']:g}{tried}: {what}. Nothing of it is saved or registered; {ADVICE}"
        )
        return
    learner.restore(saved)
    history.rollbacks.append(len(history.rows))
    factor = health.rollback_learning_rate ** (tries + 1 - len(saved.own["history"]["rollbacks"]))
    for group in learner.optimizer.param_groups:
        group["lr"] *= factor
    _tell(history, found, f"rolled back to update {learner.update}, learning rate times {factor:g}")


def _tell(history: History, found: list[Finding], action: str) -> None:
    step = int(history.rows[-1]["step"])
    for finding in found:
        history.events.append(Event(step, finding.name, finding.detail, action))
        if is_main_process():
            say(f"{history.label}: step {step}: {finding.name}: {finding.detail}; {action}")


def _save(learner: Learner, history: History, checkpoints: Checkpoints, good: bool) -> None:
    checkpoints.save(len(history.rows), _state(learner, history), good)


def _state(learner: Learner, history: History) -> State:
    plain = {name: [tuple(row) for row in getattr(history, name)] for name in ("responses", "events")}
    return learner.state(history=vars(history) | plain)


def _save_and_stop(
    trained: Trained, state: Callable[[], State], checkpoints: Checkpoints, done: int, label: str
) -> NoReturn:
    """Save between two steps, where the run was asked to stop; processes hear of it at different steps."""
    if trained.engine.num_processes == 1:
        checkpoints.save(done, state(), good=False)
        say(f"{label}: saved after {done} steps")
    raise Interrupted


def _agreed(engine: Accelerator, wanted: bool) -> bool:
    """Return what the main process wants, in all of them: their clocks differ."""
    if engine.num_processes == 1:
        return wanted
    return bool(broadcast(torch.tensor([float(wanted)], device=engine.device)))
