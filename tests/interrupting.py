"""Stages that are watched while they log, and stopped or killed at a row."""

import time
from contextlib import contextmanager

import pytest

from rrlhf.pipeline import launch


@contextmanager
def handing_on(log):
    """Have `log` see each row of the stages that this process runs, once it is written."""
    recorder = launch.recorder

    def both(*arguments):
        record = recorder(*arguments)
        return lambda row: (record(row), log(row))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "recorder", both)
        yield


def wait_for_rows(out, count, process):
    """Return when a stage that runs in `process` has written so many rows."""
    history = out / "history.jsonl"
    while process.poll() is None and not (history.is_file() and history.read_text().count("\n") >= count):
        time.sleep(0.005)
