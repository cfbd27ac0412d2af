"""The code in a key is all the code that a stage uses, as running it shows."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import rrlhf
from rrlhf.pipeline.modules import WITHOUT_EFFECT, Modules
from rrlhf.sourcecode import imports, parsed, source_file

PACKAGE = Path(rrlhf.__file__).parent
HERE = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    root = tmp_path_factory.mktemp("closure")
    command = [sys.executable, str(HERE / "imported_at_run_time.py"), str(root)]
    environment = os.environ | {"PYTHONPATH": str(PACKAGE.parent), "TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads((root / "found.json").read_text())


def test_no_function_that_a_stage_calls_is_missing_from_its_key(found):
    modules = Modules(PACKAGE)
    for stage, called in found.items():
        reached = modules.reached(f"rrlhf.stages.{stage}.run")
        called = {(module, name) for module, name in called if not name.startswith(("<", "__"))}  # no lambdas
        assert {(module, name) for module, name in called if module not in WITHOUT_EFFECT} <= set(reached), stage
        assert (f"rrlhf.stages.{stage}", "run") in called


def test_what_is_taken_to_be_without_effect_does_not_compute():
    modules = Modules(PACKAGE)
    nodes = [node for name in WITHOUT_EFFECT for node in ast.walk(parsed(source_file(name, PACKAGE.parent)))]
    behind = {each for node in nodes for _, _, each in imports(node, "") if modules.exists(each)}
    names_of_rewards = {"rrlhf.robust"}  # config.py reads these, and those of their arguments, and calls none of them
    assert behind <= {*WITHOUT_EFFECT, *names_of_rewards, "rrlhf"}


def test_every_stage_was_run(found):
    assert set(found) == {
        "prepare",
        "sft",
        "given",
        "reward",
        "member",
        "ensemble",
        "ppo",
        "dpo",
        "best_of_n",
        "evaluate",
    }
