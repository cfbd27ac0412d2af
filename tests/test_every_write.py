"""Some of the places at which a run writes, with a kill and with a full disk; all: `python -m tests.every_write`."""

import subprocess
import sys
from pathlib import Path

import pytest

NAMESPACE = ["unshare", "-rm", "true"]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", ["kill", "full"])
def test_a_run_whose_writing_ends_anywhere_is_finished_by_the_next_with_the_same_bits(kind):
    try:
        subprocess.run(NAMESPACE, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this machine lets nobody have a disk of their own")
    command = [sys.executable, "-m", "tests.every_write", kind, "--group", "sft", "--every", "12"]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "recovered" in done.stdout
