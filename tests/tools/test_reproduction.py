"""What the comparison of two folders says: bit-equal, within tolerance, or where it first differs."""

import json
import math

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from rrlhf.pipeline.artifacts import CARD, HISTORY
from rrlhf.tools.reproduce import Difference, Rebuilt, compare, conclusion, first_step, worst

FILES = ["model.safetensors", "config.json", "rollouts.parquet", "notes.txt", HISTORY, CARD]


def write(folder, weight=1.0, number=0.5, text="a", gold=2.0, notes="same", loss=0.25):
    folder.mkdir()
    tensors = {"head": torch.tensor([1.0, weight]), "count": torch.tensor([3])}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"rope": {"scale": number}, "layers": [1, 2]}))
    pq.write_table(pa.table({"text": ["x", text], "gold": [1.0, gold]}), folder / "rollouts.parquet")
    (folder / "notes.txt").write_text(notes)
    rows = [{"step": 0, "loss": 1.0, "seconds": 1.0}, {"step": 1, "loss": loss, "seconds": 2.0}]
    (folder / HISTORY).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def kept(tmp_path):
    return write(tmp_path / "kept")


def found(kept, tolerance=1e-5, **changed):
    return compare(kept, write(kept.parent / "rebuilt", **changed), FILES, tolerance)


def verdict(differences):
    return Rebuilt("sft", differences, None, 1.0).verdict


def test_equal_files_are_bit_equal_whatever_the_times_say(kept):
    assert found(kept, loss=0.1) == []
    assert verdict([]) == "bit-equal"


@pytest.mark.parametrize(
    ("changed", "file", "where"),
    [
        ({"weight": 1.1}, "model.safetensors", "head"),
        ({"number": 0.6}, "config.json", "rope.scale"),
        ({"gold": 2.5}, "rollouts.parquet", "gold"),
        ({"text": "b"}, "rollouts.parquet", "text[1]"),
        ({"notes": "other"}, "notes.txt", "bytes"),
    ],
)
def test_a_difference_is_named_by_file_and_place(kept, changed, file, where):
    differences = found(kept, **changed)
    assert verdict(differences) == "differs"
    assert differences[0][:2] == (file, where)
    size = {"head": 0.1, "rope.scale": 0.1, "gold": 0.5}.get(where, math.inf)
    assert differences[0].by == pytest.approx(size, rel=1e-5)


@pytest.mark.parametrize("changed", [{"weight": 1 + 1e-6}, {"number": 0.5 + 1e-7}, {"gold": 2 + 1e-9}])
def test_rounding_is_within_tolerance_and_not_without(kept, changed):
    assert verdict(found(kept, **changed)) == "equal within tolerance"
    assert verdict(compare(kept, kept.parent / "rebuilt", FILES, 0.0)) == "differs"


def test_what_is_not_tolerated_comes_first(kept):
    differences = found(kept, number=0.5 + 1e-7, weight=4.0)
    assert [difference.tolerated for difference in differences] == [False, True]


def test_a_missing_file_and_another_shape_differ(kept):
    again = write(kept.parent / "rebuilt")
    (again / "notes.txt").unlink()
    save_file({"head": torch.ones(3), "count": torch.tensor([3])}, again / "model.safetensors")
    differences = compare(kept, again, FILES, 1.0)
    assert {difference.file for difference in differences} == {"notes.txt", "model.safetensors"}
    assert verdict(differences) == "differs"


def test_nan_equals_nan_and_nothing_else(kept):
    again = write(kept.parent / "again", weight=math.nan)
    assert compare(again, write(kept.parent / "third", weight=math.nan), FILES, 0.0) == []
    assert verdict(compare(kept, again, FILES, 1.0)) == "differs"


def test_the_first_logged_step_that_parts_is_told(kept):
    again = write(kept.parent / "rebuilt", loss=0.2)
    assert first_step(kept, again) == "step 1: loss 0.25, now 0.2"
    assert first_step(kept, kept) is None
    (again / HISTORY).write_text("")
    assert first_step(kept, again) == "2 logged rows, now 0"


def test_the_worst_result_decides_and_is_named():
    close = Difference("config.json", "a", 1e-9, tolerated=True)
    bad = Difference("model.safetensors", "head", 0.5, tolerated=False)
    rebuilt = [Rebuilt("sft", [], None, 1.0), Rebuilt("reward", [close], None, 1.0)]
    assert worst(rebuilt[:1]).verdict == "bit-equal"
    assert "in reward: config.json, a" in conclusion("v", rebuilt)
    rebuilt.append(Rebuilt("ppo-robust", [bad, close], "step 3: loss 1, now 2", 1.0))
    assert worst(rebuilt).verdict == "differs"
    told = "in ppo-robust: model.safetensors, head by 0.5; its training first parted at step 3"
    assert told in conclusion("v", rebuilt)
