"""Starting a stage from its key document."""

import json
import sys
import types
from pathlib import Path

import pytest

from rrlhf.config import Launch, Ppo, typed_arm
from rrlhf.pipeline import launch
from rrlhf.pipeline.graph import nodes
from rrlhf.pipeline.keys import key_document
from rrlhf.pipeline.launch import LaunchError, execute
from rrlhf.pipeline.params import load_params
from rrlhf.policy.health import DivergedError
from rrlhf.stopping import Interrupted, stop

ROOT = Path(__file__).parents[2]
HERE = Launch(
    processes=1, threads=1, arms_at_once=1, runner="threads", sharding="none"
)  # more would stay with the tests that come after
TWO = HERE.model_copy(update={"processes": 2})


@pytest.fixture
def stage(monkeypatch):
    """A stand-in stage, `rrlhf.standin`, whose `run` a test sets."""
    module = types.ModuleType("rrlhf.stages.standin")
    monkeypatch.setitem(sys.modules, "rrlhf.stages.standin", module)
    return module


def rows_of(out):
    return [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]


def run(out, **inputs):
    execute({"stage": "standin", "params": {"seed": 1}}, inputs=inputs, out=out, launch=HERE)


def test_a_stage_gets_its_typed_sections_and_its_inputs(tmp_path, monkeypatch):
    params, seen = load_params(ROOT, "tiny"), {}
    module = types.ModuleType("rrlhf.stages.ppo")
    module.run = lambda **arguments: seen.update(arguments)
    monkeypatch.setitem(sys.modules, "rrlhf.stages.ppo", module)
    node = next(node for node in nodes(params) if node.name == "ppo-robust")
    execute(key_document(node, {}), inputs={"data": tmp_path}, out=tmp_path / "out", launch=HERE)
    assert isinstance(seen["ppo"], Ppo)
    assert seen["arm"] == typed_arm(reward="robust", nominal_weight=0.4, credible=8.0, seed=1)
    assert seen["data"] == tmp_path


def test_the_policies_of_all_arms_are_one_argument(tmp_path, stage):
    seen = {}
    stage.run = lambda **arguments: seen.update(arguments)
    named = {"ppo-single": Path("b"), "dpo-ppo-x": Path("c"), "best_of_n-few": Path("d")}
    run(tmp_path / "out", sft=Path("a"), **named)
    assert seen.keys() == {"sft", "policies", "out", "log", "seed"}
    assert list(seen["policies"].items()) == [("single", Path("b")), ("ppo-x", Path("c")), ("few", Path("d"))]
    assert seen["sft"] == Path("a")


def test_members_are_one_argument_in_the_order_of_their_numbers(tmp_path, stage):
    seen = {}
    stage.run = lambda **arguments: seen.update(arguments)
    run(tmp_path / "out", **{f"member-{number}": Path(str(number)) for number in (10, 2, 0)})
    assert list(seen["members"].items()) == [(f"member-{n}", Path(str(n))) for n in (0, 2, 10)]


def test_every_row_is_written_at_once(tmp_path, stage):
    def log_two(log, out, **_):
        for step in (1, 2):
            log({"step": step, "loss": 1 / step})
            assert len(rows_of(out)) == step

    stage.run = log_two
    run(tmp_path / "out")
    assert [row["loss"] for row in rows_of(tmp_path / "out")] == [1.0, 0.5]


def test_a_stage_starts_clean_without_a_checkpoint(tmp_path, stage):
    out = tmp_path / "out"
    out.mkdir()
    (out / "half.bin").write_bytes(b"half")
    (out / "history.jsonl").write_text('{"step": 1}\n')
    stage.run = lambda **_: None
    run(out)
    assert [path.name for path in out.iterdir()] == ["history.jsonl"]
    assert rows_of(out) == []


def test_a_resumed_stage_tells_every_row_once_with_the_time_of_its_first_telling(tmp_path, stage):
    out = tmp_path / "out"
    (out / "checkpoint").mkdir(parents=True)
    (out / "history.jsonl").write_text('{"step": 1, "seconds": 50}\n{"step": 2, "seconds": 99}\n{"st')
    stage.run = lambda log, **_: [log({"step": step}) for step in (1, 2, 3)]
    run(out)
    assert [row["step"] for row in rows_of(out)] == [1, 2, 3]
    first, second, third = (row["seconds"] for row in rows_of(out))
    assert (first, second) == (50, 99)
    assert 99 <= third < 110  # the clock goes on, however long the interruption was


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_that_is_none_stops_the_stage(tmp_path, stage, value):
    stage.run = lambda log, **_: log({"step": 7, "loss": value})
    with pytest.raises(ValueError, match=r"standin: loss = (nan|inf) at step 7"):
        run(tmp_path / "out")


def test_the_last_lines_of_failed_processes_are_told(tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "launcher", lambda count: ["-c", "raise SystemExit('no such option')"])
    document = {"stage": "sft", "params": {"model": {"device": "cpu"}}}
    with pytest.raises(LaunchError, match=r"sft in 2 processes ended with 1:\nno such option"):
        execute(document, inputs={}, out=tmp_path / "out", launch=TWO)


def test_what_other_processes_print_is_handed_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(launch, "launcher", lambda count: ["-c", "print('hello', 'bye', sep='\\n', end='')"])
    document = {"stage": "sft", "params": {"model": {"device": "cpu"}}}
    execute(document, inputs={}, out=tmp_path / "out", launch=TWO)
    assert capsys.readouterr().err == "hello\nbye\n"


def test_a_run_that_is_asked_to_stop_ends_its_other_processes(tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "launcher", lambda count: ["-c", "import time; time.sleep(600)"])
    document = {"stage": "sft", "params": {"model": {"device": "cpu"}}}
    stop.set()
    try:
        with pytest.raises(Interrupted):
            execute(document, inputs={}, out=tmp_path / "out", launch=TWO)
    finally:
        stop.clear()


def test_code_of_reward_functions_that_changed_stops_another_process(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_rules.py").write_text("def f(**_): return []")
    document = {"stage": "sft", "params": {"model": {"device": "cpu"}}, "functions": {"my_rules": "of other code"}}
    with pytest.raises(LaunchError, match=r"^my_rules changed since the run began"):
        execute(document, inputs={}, out=tmp_path / "out", launch=HERE, beside=1)


def test_a_training_that_diverged_in_another_process_is_told_as_one(tmp_path, monkeypatch):
    says = "import sys; from pathlib import Path; Path(sys.argv[-1]).with_suffix('.problem').write_text(sys.argv[1])"
    told = '{"diverged": true, "said": "DIVERGED at step 4"}'
    monkeypatch.setattr(launch, "launcher", lambda count: ["-c", f"{says}; raise SystemExit(1)", told])
    document = {"stage": "ppo", "params": {"model": {"device": "cpu"}}}
    with pytest.raises(DivergedError, match=r"^DIVERGED at step 4$"):
        execute(document, inputs={}, out=tmp_path / "out", launch=TWO)


def test_an_error_in_another_process_is_told_in_its_words(tmp_path):
    node = next(node for node in nodes(load_params(ROOT, "tiny")) if node.name == "sft")
    away = tmp_path / "away"
    with pytest.raises(LaunchError, match=f"^.*{away}[^\n]*$"):
        execute(key_document(node, {}), inputs={"data": away}, out=tmp_path / "out", launch=HERE, beside=1)
