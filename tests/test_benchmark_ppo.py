"""benchmarks/ppo.py: our side at a tiny size, and its tables."""

import dataclasses
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "benchmarks" / "ppo.py"


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("benchmark_ppo", SOURCE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    before = list(sys.path)
    spec.loader.exec_module(module)
    yield module
    sys.path[:] = before
    del sys.modules[spec.name]


def process(update_s, train_s, peak_mib, libraries_mib=100.0, **more):
    update = {"update_s": update_s, "train_s": train_s, "rollout_s": update_s - train_s, "sampling_s": 0.1, "steps": 16}
    return {"updates": [update], "peak_mib": peak_mib, "libraries_mib": libraries_mib, "tokens": 100} | more


@pytest.fixture
def document():
    flop = {"train_flop": 40e9, "rollout_flop": 1e9, "decode_flop": 0.5e9}
    kinds = {
        "rate": [{"train": 100.0, "rollout": 50.0}] * 3,
        "trl": [process(8.0, 6.0, 500.0), process(10.0, 6.0, 500.0), process(12.0, 6.0, 500.0)],
        "full-5": [
            process(3.0, 2.0, 200.0, **flop),
            process(2.5, 2.0, 200.0, **flop),
            process(2.0, 1.0, 200.0, **flop),
        ],
    }
    sizes = {"7M": {"limit": 3.0}}
    return {"device": "cpu", "peak_tflops": None, "results": {"7M": kinds}, "sizes": sizes}


def test_our_side_measures_what_the_tables_need(bench, tmp_path):
    """A tiny model, a few tokens: every number is there, and the steps and lengths that were asked for."""
    from benchmarks import ours_ppo

    size = dataclasses.replace(
        bench.SIZES["0.16M"], base="random:2x16", responses=4, minibatch_size=2, epochs=2, response_tokens=4, updates=1
    )
    job = dataclasses.asdict(size) | {"device": "cpu", "dtype": "float32", "seed": 1, "folder": str(tmp_path / "model")}
    job |= ours_ppo.prepare(job)
    found = {kind: [ours_ppo.train(job | bench.KINDS[kind][1])] for kind in ("full-5", "lora-5")}
    found["rate"] = [ours_ppo.rate(job)]
    (run,), (adapted,) = found["full-5"], found["lora-5"]
    (update,) = run["updates"]
    assert update["steps"] == 4
    assert update["update_s"] == pytest.approx(update["rollout_s"] + update["train_s"])
    assert 0 < update["sampling_s"] < update["rollout_s"]
    assert run["tokens"] == 16
    assert run["trained"] > adapted["trained"] > 0
    assert run["train_flop"] > adapted["train_flop"] > 0
    assert run["peak_mib"] >= run["libraries_mib"] > 0
    assert len(bench.cost_rows({"tiny": found})) == 2
    assert len(bench.rate_rows({"tiny": found}, None)) == 4
    json.dumps(found)


def test_costs_are_compared_turn_by_turn(bench, document):
    row = bench.cost_rows(document["results"])[1]
    assert row[:2] == ["7M", "rrlhf: full, 5 heads"]
    assert row[5:] == ["4x (2.67-6)", "200", "0.40"]


def test_rates_are_shares_of_the_matrix_products(bench, document):
    train, rollout = bench.rate_rows(document["results"], None)
    assert train[2:6] == ["train", "100", "20.0", "20%"]
    assert rollout[2:5] == ["rollout", "67", "1.0"]  # half of it at 100, half at 50
    assert bench.rate_rows(document["results"], 0.1)[0][5] == "20%"


def test_targets_tell_what_was_met(bench, document):
    cost, memory, alone = bench.targets(document["results"], document["sizes"])
    assert (cost.measured, cost.met) == (pytest.approx(4.0), True)
    assert (memory.measured, memory.met) == (pytest.approx(0.4), True)
    assert (alone.measured, alone.met) == (pytest.approx(0.25), True)
    assert "| 7M   | full-5 / TRL, peak memory" in bench.report(document)


def test_a_device_is_compared_with_a_cpu_number_by_number(tmp_path):
    from safetensors.torch import load_file, save_file

    from benchmarks import gpu

    found = gpu.step("cpu", tmp_path)
    same, moved = tmp_path / "cpu.safetensors", load_file(tmp_path / "cpu.safetensors")
    (tmp_path / "other.safetensors").write_bytes(same.read_bytes())
    assert max(gpu.differences(found, found, tmp_path, "other").values()) == pytest.approx(0, abs=1e-9)
    save_file({name: -moved[name] for name in moved}, tmp_path / "other.safetensors")
    off = gpu.differences(found | {"value_loss": 2 * found["value_loss"]}, found, tmp_path, "other")
    assert {name for name, limit in gpu.TOLERANCES.items() if off[name] > limit} == {*gpu.TOLERANCES} - {
        "gradient's norm"
    }


@pytest.mark.slow
def test_the_script_for_a_gpu_runs_whole_on_a_cpu():
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "step", "tiny"]
    done = subprocess.run(command, cwd=SOURCE.parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "| tiny" in done.stdout
