"""A PPO run that was killed and started again ends as if it never had been."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pyarrow.parquet as pq
import pytest
import torch
from accelerate import Accelerator
from conftest import save_random_heads
from interrupting import handing_on, wait_for_rows
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from rrlhf.config import Launch, typed_arm
from rrlhf.files import CHECKPOINT
from rrlhf.locks import locked
from rrlhf.memo import sha256
from rrlhf.pipeline.keys import key_digest
from rrlhf.pipeline.launch import execute
from rrlhf.pipeline.params import load_params
from rrlhf.pipeline.store import Store
from rrlhf.policy.checkpoint import Checkpoints
from rrlhf.policy.health import DivergedError

ROOT = Path(__file__).parents[2]
UPDATES = 6
HEALTH = {"patience": 100}  # a random model's rewards can be constant for a few rollouts
PROGRAM = """
import json, sys
from pathlib import Path
from rrlhf.config import Launch
from rrlhf.locks import locked
from rrlhf.pipeline.launch import execute
job = json.loads(sys.argv[1])
inputs, out = {name: Path(folder) for name, folder in job["inputs"].items()}, Path(job["out"])
with locked(out.with_suffix(".lock")) as lock:
    launch, beside = Launch(**job["launch"]), job["beside"]
    execute(job["document"], inputs=inputs, out=out, launch=launch, lock=lock, beside=beside)
"""


class KilledError(Exception):
    pass


@pytest.mark.parametrize("processes", [1, 2, 3, 5])
def test_a_checkpoint_is_gone_on_from_by_any_number_of_processes(processes, tmp_path):
    """Saved by three: what each of them knew is known once, and everyone goes on with somebody's randomness."""

    def checkpoints(rank, of):
        engine = Accelerator(cpu=True)
        there = SimpleNamespace(process_index=rank, num_processes=of, is_main_process=rank == 0)
        there.distributed_type, there.wait_for_everyone = engine.distributed_type, lambda: None
        return Checkpoints(tmp_path, there, seed=1)

    saved = tmp_path / CHECKPOINT / "00000002"
    saved.mkdir(parents=True)
    content = {"shared.pt": {"update": 2}} | {f"own-{rank}.pt": {"random": rank} for rank in range(3)}
    for name, one in content.items():
        torch.save(one, saved / name)
    files = {name: sha256(saved / name) for name in content}
    (saved / "checkpoint.json").write_text(json.dumps({"made_for": {"seed": 1}, "files": files}))
    found = [checkpoints(rank, processes).newest() for rank in range(processes)]
    assert sorted(own["random"] for state in found for own in state.owns) == [0, 1, 2]
    assert [state.own["random"] for state in found] == [rank % 3 for rank in range(processes)]


@pytest.fixture(scope="module")
def inputs(start):
    for name, heads in (("reward", 1), ("ensemble", 3)):
        save_random_heads(start / name, heads)
    return {name: start / name for name in ("data", "sft", "reward", "ensemble")}


def document(every=2, **changed):
    params = load_params(ROOT, "tiny")
    model = params.model.model_copy(update={"base": "random:3x32"})
    ppo = params.ppo.model_copy(update={"updates": UPDATES, "learning_rate": 1e-3} | changed)
    arm = typed_arm(reward="robust", nominal_weight=0.4, credible=2.0, seed=1)
    health = params.health.model_copy(update=HEALTH | {"checkpoint_every": every})
    sections = {"model": model, "ppo": ppo, "health": health, "arm": arm}
    return {"stage": "ppo", "params": {name: section.model_dump() for name, section in sections.items()}}


def launch(processes=1, sharding="none"):
    return Launch(processes=processes, threads=1, arms_at_once=1, runner="threads", sharding=sharding)


def run(inputs, out, log=lambda row: None, every=2, **changed):
    with handing_on(log), locked(out.with_suffix(".lock")) as lock:
        execute(document(every, **changed), inputs=inputs, out=out, launch=launch(), lock=lock)


def started(inputs, out, beside=0, processes=1, sharding="none", **streams):
    """Run the stage in a process of its own, as the flow does."""
    job = {"document": document(), "inputs": {name: str(folder) for name, folder in inputs.items()}, "out": str(out)}
    job |= {"launch": launch(processes, sharding).model_dump(), "beside": beside}
    return subprocess.Popen([sys.executable, "-c", PROGRAM, json.dumps(job)], cwd=ROOT, **streams)


def result(out):
    """What must be equal: weights and responses to the last bit, and every row but for its times."""
    rows = [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]
    timeless = [{k: v for k, v in row.items() if k not in {"seconds", "tokens_per_second"}} for row in rows]
    assert [row["step"] for row in rows] == list(range(UPDATES))
    assert not (out / CHECKPOINT).exists()
    return sha256(out / "model.safetensors"), pq.read_table(out / "rollouts.parquet").to_pylist(), timeless


def asked(ended):
    """Every response's update and prompt, whichever process had it."""
    return sorted((each["update"], each["prompt"]) for each in ended[1])


def stops_at(step):
    def log(row):
        if row["step"] == step:
            raise KilledError

    return log


@pytest.fixture(scope="module")
def whole(inputs, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    run(inputs, out)
    return result(out)


@pytest.fixture(scope="module")
def broken(inputs, tmp_path_factory):
    """The folder of a run that broke at its fourth rollout, which was saved."""
    out = tmp_path_factory.mktemp("broken")
    with pytest.raises(KilledError):
        run(inputs, out, stops_at(3))
    return out


@pytest.fixture
def stopped(broken, tmp_path):
    return shutil.copytree(broken, tmp_path / "stopped")


@pytest.fixture
def computed(monkeypatch):
    """A list that has an entry for each rollout that is computed."""
    from rrlhf.stages import ppo

    rollouts, collect = [], ppo.collect
    monkeypatch.setattr(ppo, "collect", lambda *arguments: rollouts.append(1) or collect(*arguments))
    return rollouts


def test_a_run_that_was_interrupted_ends_with_the_same_bits(inputs, tmp_path, whole):
    for step in (0, 1, 2, 5):
        with pytest.raises(KilledError):
            run(inputs, tmp_path, stops_at(step))
    run(inputs, tmp_path)
    assert result(tmp_path) == whole


def test_only_what_came_after_the_checkpoint_is_computed_again(inputs, stopped, whole, computed):
    run(inputs, stopped)
    assert len(computed) == 2
    assert result(stopped) == whole


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["none", "full"])
def test_one_of_several_processes_that_is_killed_is_told_and_another_number_of_them_goes_on(
    inputs, tmp_path, whole, sharding
):
    with started(inputs, tmp_path, processes=2, sharding=sharding, stderr=subprocess.PIPE, text=True) as training:
        wait_for_rows(tmp_path, 3, training)
        ranks = [each for each in psutil.Process(training.pid).children(recursive=True) if "RANK" in each.environ()]
        next(each for each in ranks if each.environ()["RANK"] == "1").kill()
        _, told = training.communicate(timeout=120)
    assert "ppo in 2 processes ended with 1: one of them was killed (SIGKILL)" in told
    run(inputs, tmp_path)
    assert asked(result(tmp_path)) == asked(whole)


@pytest.mark.slow
def test_what_one_process_saved_is_gone_on_from_by_two_that_share_the_weights(inputs, stopped, whole):
    execute(document(), inputs=inputs, out=stopped, launch=launch(2, "full"))
    ended = result(stopped)
    assert asked(ended) == asked(whole)
    assert ended[2][:4] == whole[2][:4]


@pytest.mark.slow
def test_processes_save_the_same_model_where_they_share_its_weights(inputs, tmp_path):
    told, saved = document(updates=2, trains="lora"), []
    for each in (launch(2, "none"), launch(2, "full")):
        out = tmp_path / each.sharding
        execute(told, inputs=inputs, out=out, launch=each)
        network, report = AutoModelForCausalLM.from_pretrained(out, dtype="auto", output_loading_info=True)
        assert not any(report.values())
        saved.append(network.state_dict())
    start = load_file(inputs["sft"] / "model.safetensors")
    far, moved = ({n: (w - one[n]).float().abs().mean() for n, w in saved[0].items()} for one in (saved[1], start))
    assert max(moved.values()) > 1e-4
    assert all(far[name] <= 0.02 * max(moved.values()) for name in far), (far, moved)


@pytest.mark.slow
def test_processes_that_share_the_weights_roll_back_as_others_do(inputs, tmp_path):
    told, ended = document(every=1), []
    told["params"]["health"]["max_token_kl"] = 1e-6
    for each in (launch(2, "none"), launch(2, "full")):
        with pytest.raises(DivergedError) as found:
            execute(told, inputs=inputs, out=tmp_path / each.sharding, launch=each)
        ended.append(str(found.value))
    assert "after 2 rollbacks" in ended[0]
    assert ended[0] == ended[1]


@pytest.mark.parametrize("beside", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_killed_process_leaves_what_is_needed_to_go_on(inputs, tmp_path, whole, beside):
    draw = random.Random(beside)
    process = started(inputs, tmp_path, beside)
    wait_for_rows(tmp_path, draw.randrange(1, UPDATES - 1), process)
    time.sleep(draw.uniform(0, 0.05))
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    run(inputs, tmp_path)
    assert result(tmp_path) == whole


def is_at_work(process):
    """Whether a process of others runs; one that has ended may not have been told of its end."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.slow
def test_a_run_waits_for_the_processes_of_one_that_was_killed(inputs, tmp_path, whole):
    process = started(inputs, tmp_path, processes=2)
    wait_for_rows(tmp_path, 2, process)
    others, alive = psutil.Process(process.pid).children(recursive=True), []
    process.kill()
    process.wait()
    run(inputs, tmp_path, lambda row: alive.append(any(map(is_at_work, others))))
    assert not any(alive)
    assert asked(result(tmp_path)) == asked(whole)


@pytest.mark.parametrize("harm", ["half-written", "changed", "no manifest"])
def test_a_checkpoint_that_is_not_whole_is_not_used(inputs, stopped, whole, harm):
    (saved,) = (stopped / CHECKPOINT).glob("00000004*")
    if harm == "half-written":
        saved.rename(stopped / CHECKPOINT / ".partial")
    elif harm == "changed":
        (saved / "shared.pt").write_bytes(b"half")
    else:
        (saved / "checkpoint.json").unlink()
    run(inputs, stopped)
    assert result(stopped) == whole


def test_a_checkpoint_of_other_settings_is_not_used(inputs, stopped, computed, capsys):
    with pytest.raises(KilledError):
        run(inputs, stopped, stops_at(0), kl_weight=0.5)
    assert "made with other settings (ppo)" in capsys.readouterr().err
    assert len(computed) == 1


def test_other_settings_are_prepared_in_another_folder(tmp_path):
    folders = {Store(tmp_path).staging("ppo", key_digest(document(kl_weight=weight))) for weight in (0.1, 0.2)}
    assert len(folders) == 2
