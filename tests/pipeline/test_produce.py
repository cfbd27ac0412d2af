"""Having a result: found, computed, or computed again and compared."""

import json
from contextlib import nullcontext

import pytest

from rrlhf.pipeline.artifacts import HISTORY
from rrlhf.pipeline.produce import DifferentError, produce
from rrlhf.pipeline.store import Store

DOCUMENT = {"stage": "sft", "params": {"epochs": 1}, "inputs": {}, "code": {}, "numerics": {}}


@pytest.fixture
def have(tmp_path):
    """Have the result of a stage that writes this text; tell whether it was computed."""
    store = Store(tmp_path)

    def call(text, *, force=False):
        def compute(staged, _):
            staged.mkdir(parents=True)
            (staged / "model.txt").write_text(text)
            (staged / HISTORY).write_text("")

        return produce(store, "sft", DOCUMENT, compute, recorded=lambda staged: nullcontext(), force=force)

    return call


def test_what_is_there_is_not_computed(have):
    made, first = have("weights")
    found, second = have("others")
    assert (first, second, found.digest) == (True, False, made.digest)


def test_a_forced_result_with_the_same_bits_leaves_nothing_behind(have, tmp_path):
    made, _ = have("weights")
    manifest = (made.path / "artifact.json").read_bytes()
    again, computed = have("weights", force=True)
    assert (computed, again.digest, (made.path / "artifact.json").read_bytes()) == (True, made.digest, manifest)
    assert [*(tmp_path / "artifacts" / ".staging").iterdir()] == []


def test_a_forced_result_with_other_bits_is_refused_and_both_stay(have, tmp_path):
    made, _ = have("weights")
    with pytest.raises(DifferentError, match=r"model\.txt"):
        have("others", force=True)
    assert (made.path / "model.txt").read_text() == "weights"
    assert json.loads((made.path / "artifact.json").read_bytes())["digest"] == made.digest
    (kept,) = (tmp_path / "artifacts" / ".differing").iterdir()
    assert (kept / "model.txt").read_text() == "others"
    assert Store(tmp_path).checked("sft", made.key) == made


def test_forcing_what_is_not_there_computes_it_once(have):
    made, computed = have("weights", force=True)
    assert computed
    assert have("weights")[0].digest == made.digest
