"""What a loop tells where there is no terminal."""

from types import SimpleNamespace

import pytest

from rrlhf import progress


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still unless it is moved."""
    now = SimpleNamespace(seconds=100.0)
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: now.seconds))
    return now


def told(clock, capsys, steps, seconds):
    """The lines of a loop whose steps take so long."""
    for _ in progress.track(range(steps), steps, "sft"):
        clock.seconds += seconds
    return capsys.readouterr().err.splitlines()


def test_the_time_left_is_told_from_the_first_second_on(clock, capsys):
    lines = told(clock, capsys, 100, 0.5)
    assert lines[0] == "sft  2/100  49 s left"
    assert lines[1] == "sft  22/100  39 s left"
    assert lines[-1] == "sft  100/100  0 s left"
    assert len(lines) == 6


def test_a_slow_step_is_told_when_it_is_done(clock, capsys):
    assert told(clock, capsys, 3, 60)[0] == "sft  1/3  2 min 00 s left"


def test_a_loop_of_less_than_a_second_says_nothing(clock, capsys):
    assert told(clock, capsys, 9, 0.1) == []
