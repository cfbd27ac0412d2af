"""SFT and DPO that were stopped or killed, and started again, end as if they never had been."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from interrupting import handing_on, wait_for_rows

from rrlhf import stopping
from rrlhf.config import Launch, typed_arm
from rrlhf.files import CHECKPOINT
from rrlhf.memo import sha256
from rrlhf.pipeline.launch import execute
from rrlhf.pipeline.params import load_params
from rrlhf.policy import supervision
from rrlhf.policy.supervision import shuffled
from rrlhf.stopping import Interrupted

ROOT = Path(__file__).parents[2]
PARAMS = load_params(ROOT, "tiny", {"model.base": "random:3x32", "sft.batch_size": 8, "sft.epochs": 3})
MODEL = PARAMS.model.model_dump()
DPO = PARAMS.dpo.model_copy(update={"pairs_per_batch": 10, "epochs": 2, "train_layers": 2})
DOCUMENTS = {
    "sft": {"stage": "sft", "params": {"seed": 1, "model": MODEL, "sft": PARAMS.sft.model_dump()}},
    "dpo": {
        "stage": "dpo",
        "params": {"model": MODEL, "dpo": DPO.model_dump(), "arm": typed_arm(method="dpo", seed=1).model_dump()},
    },
}
PROGRAM = """
import json, sys
from pathlib import Path
from rrlhf.config import Launch
from rrlhf.policy import supervision
from rrlhf.pipeline.launch import execute
supervision.SECONDS_BETWEEN_CHECKPOINTS = 0.0
document, inputs, out = map(json.loads, sys.argv[1:])
execute(document, inputs={name: Path(folder) for name, folder in inputs.items()}, out=Path(out),
        launch=Launch(processes=1, threads=1, arms_at_once=1, runner="threads", sharding="none"))
"""


class KilledError(Exception):
    pass


# Both go through the same steps: one is enough where every test has to train three times, or in another process.
one_in_short = pytest.mark.parametrize("document", ["sft", pytest.param("dpo", marks=pytest.mark.slow)], indirect=True)


@pytest.fixture(scope="module", params=DOCUMENTS)
def document(request):
    return DOCUMENTS[request.param]


@pytest.fixture(scope="module")
def inputs(document, start):
    return {name: start / name for name in (("data",) if document["stage"] == "sft" else ("data", "sft"))}


def run(document, inputs, out, log=lambda row: None):
    with handing_on(log):
        execute(
            document,
            inputs=inputs,
            out=out,
            launch=Launch(processes=1, threads=1, arms_at_once=1, runner="threads", sharding="none"),
        )


def result(out):
    """What must be equal: the weights to the last bit, and every row but for its times."""
    rows = [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]
    assert not (out / CHECKPOINT).exists()
    return sha256(out / "model.safetensors"), [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


@pytest.fixture(scope="module")
def whole(document, inputs, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    run(document, inputs, out)
    return result(out)


def test_one_that_broke_goes_on_from_its_last_checkpoint(document, inputs, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(supervision, "SECONDS_BETWEEN_CHECKPOINTS", 0.0)
    total, out, logged = len(whole[1]) - 1, tmp_path / "out", []  # the first row tells what was cut
    assert total >= 6

    def breaks(row):
        logged.append(row["step"])
        if row["step"] in {2, total - 1} and logged.count(row["step"]) == 1:
            raise KilledError

    for _ in range(2):
        with pytest.raises(KilledError):
            run(document, inputs, out, breaks)
    run(document, inputs, out, breaks)
    assert result(out) == whole
    assert logged == [0, 1, 2, *range(total), *range(total + 1)]  # rows before the checkpoint are told again


def test_one_that_is_asked_to_stop_saves_its_last_step(document, inputs, whole, tmp_path, capsys):
    out = tmp_path / "out"

    def asks(row):
        if row["step"] == 3:
            stopping.stop.set()

    try:
        with pytest.raises(Interrupted):
            run(document, inputs, out, asks)
    finally:
        stopping.stop.clear()
    assert f"{document['stage']}: saved after 3 steps" in capsys.readouterr().err
    (saved,) = [path for path in (out / CHECKPOINT).iterdir() if path.is_dir()]
    assert int(saved.name[:8]) == 3
    run(document, inputs, out)
    assert result(out) == whole


@one_in_short
def test_one_that_was_killed_ends_with_the_same_bits(document, inputs, whole, tmp_path):
    out = tmp_path / "out"
    arguments = [json.dumps(part) for part in (document, {name: str(path) for name, path in inputs.items()}, str(out))]
    command = [sys.executable, "-c", PROGRAM, *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, cwd=ROOT, env=environment) as process:
        wait_for_rows(out, 5, process)
        time.sleep(0.02)  # in a step, or in the writing of a checkpoint
        process.kill()
    run(document, inputs, out)
    assert result(out) == whole


@one_in_short
def test_other_settings_start_anew(document, inputs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(supervision, "SECONDS_BETWEEN_CHECKPOINTS", 0.0)

    def breaks(row):
        if row["step"] == 3:
            raise KilledError

    name = document["stage"]
    changed = document["params"][name] | {"learning_rate": 1.0e-3}
    other = document | {"params": document["params"] | {name: changed}}
    with pytest.raises(KilledError):
        run(document, inputs, tmp_path / "out", breaks)
    run(other, inputs, tmp_path / "out")
    assert f"it was made with other settings ({name})" in capsys.readouterr().err
    run(other, inputs, tmp_path / "again")
    assert result(tmp_path / "out") == result(tmp_path / "again")


@given(st.integers(1, 20), st.integers(1, 7), st.integers(1, 3), st.integers(0, 5))
def test_every_epoch_has_every_row_once(rows, size, epochs, seed):
    batches = shuffled(rows, size, epochs, seed)
    per_epoch = -(-rows // size)
    assert len(batches) == epochs * per_epoch
    for epoch in range(epochs):
        seen = [row for batch in batches[epoch * per_epoch : (epoch + 1) * per_epoch] for row in batch]
        assert sorted(seen) == list(range(rows))
    assert all(len(batch) == size for i, batch in enumerate(batches) if (i + 1) % per_epoch)
    assert batches == shuffled(rows, size, epochs, seed)
