"""The code in a key is all the code that a stage uses, as running it shows."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import rrlhf
from rrlhf.pipeline.modules import WITHOUT_EFFECT, read_module

PACKAGE = Path(rrlhf.__file__).parent
HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    root = tmp_path_factory.mktemp("closure")
    command = [sys.executable, str(HERE / "imported_at_run_time.py"), str(root)]
    environment = os.environ | {"PYTHONPATH": str(PACKAGE.parent), "TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads((root / "found.json").read_text())


def source(module):
    base = PACKAGE.joinpath(*module.split(".")[1:])
    return base / "__init__.py" if base.is_dir() else base.with_suffix(".py")


def below(modules):
    """Return modules and all that they import."""
    seen, waiting = set(), [*modules]
    while waiting:
        name = waiting.pop()
        if name in seen or not source(name).is_file():
            continue
        seen.add(name)
        waiting += [
            each for each in read_module(source(name), name.rpartition(".")[0]).imports if each.startswith("rrlhf")
        ]
    return seen


def test_no_module_that_a_stage_uses_is_missing_from_its_key(found):
    without_effect = below(WITHOUT_EFFECT)
    for stage, modules in found.items():
        used = {name for name in modules["used"] if read_module(source(name), "").definitions}
        assert used <= {*modules["code"], *without_effect}, stage
        assert f"rrlhf.stages.{stage}" in used


def test_what_is_taken_to_be_without_effect_is_not_what_computes(found):
    """The mathematics, the models and the data are in the keys: none of it hides behind a module that is left out."""
    folders = ("stages", "policy", "rewards", "judging", "data", "models")
    files = [path for folder in folders for path in (Path(rrlhf.__file__).parent / folder).glob("[a-z]*.py")]
    computes = {f"rrlhf.{path.parent.name}.{path.stem}" for path in files} - WITHOUT_EFFECT
    computes |= {f"rrlhf.{name}" for name in ("robust", "kl", "losses", "returns", "advantages")}
    assert not computes & below(WITHOUT_EFFECT)


def test_every_stage_was_run(found):
    assert set(found) == {"prepare", "sft", "reward", "member", "ensemble", "ppo", "dpo", "best_of_n", "evaluate"}
