"""The parts of the benchmarks that measure nothing: pairs, statistics, tables."""

import importlib.util
import sys
from pathlib import Path

import pytest

from benchmarks.scale import exponent

SOURCE = Path(__file__).parents[1] / "benchmarks" / "reward.py"


@pytest.fixture(scope="module")
def reward():
    spec = importlib.util.spec_from_file_location("benchmark_reward", SOURCE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def runs(*train_s, pairs=100, **more):
    return [{"pairs": pairs, "train_s": s, "accuracy": 0.75, "peak_mib": 200.0} | more for s in train_s]


@pytest.fixture
def results():
    """TRL: 10 pairs a second; full: 20; frozen: 300 with a trunk of 0.3 s. Fifty heads: three times one head's cost."""
    heads = {
        f"frozen-{k}": runs(1 / 3, 1 / 3, 1 / 3, features_s=0.3, fit_s=fit_s, score_s=fit_s / 10, epochs=60)
        for k, fit_s in ((1, 0.03), (5, 0.033), (20, 0.06), (50, 0.09))
    }
    return {"7M": {"trl": runs(10.0, 8.0, 12.0), "full": runs(5.0, 5.0, 4.0), **heads}}


def test_pairs_depend_on_the_seed_alone(reward):
    assert reward.synthetic_pairs(20, 1) == reward.synthetic_pairs(20, 1)
    assert reward.synthetic_pairs(20, 1) != reward.synthetic_pairs(20, 2)
    assert reward.synthetic_pairs(30, 1)[:20] == reward.synthetic_pairs(20, 1)


def test_about_nine_labels_in_ten_follow_the_words_and_lengths_are_spread(reward):
    pairs = reward.synthetic_pairs(1000, 3)
    better, worse = (set(reward.WORDS[name].split()) for name in ("better", "worse"))

    def kindness(text):
        return sum((word in better) - (word in worse) for word in text.split())

    follows = sum(kindness(pair["chosen"]) > kindness(pair["rejected"]) for pair in pairs) / 1000
    lengths = sorted(len(pair["chosen"].split()) for pair in pairs)
    assert 0.85 < follows < 0.95
    assert lengths[0] >= 3
    assert lengths[500] == pytest.approx(20, abs=2)
    assert 40 < lengths[950] <= 96


def test_spread_is_median_least_and_largest(reward):
    assert reward.spread([3.0, 1.0, 10.0]) == (3.0, 1.0, 10.0)


def test_ratios_are_taken_turn_by_turn(reward):
    assert reward.paired_ratio([4.0, 6.0, 8.0], [2.0, 2.0, 2.0]) == (3.0, 2.0, 4.0)
    with pytest.raises(ValueError, match="longer"):
        reward.paired_ratio([1.0], [1.0, 2.0])


def test_heads_are_compared_alone_and_with_the_trunk(reward, results):
    cost = reward.head_costs(results["7M"], 50)
    assert cost["fit_s alone"] == pytest.approx(3)
    assert cost["fit_s with trunk"] == pytest.approx(0.39 / 0.33)
    assert cost["score_s with trunk"] == pytest.approx(0.309 / 0.303)
    assert set(reward.head_costs(results["7M"], 1).values()) == {1.0}


def test_targets_tell_what_was_met(reward, results):
    found = {target.name: target for target in reward.targets(results)}
    assert found["full / TRL"].measured == pytest.approx(2)
    assert found["frozen / TRL, one epoch"].measured == pytest.approx(30)
    assert found["frozen / TRL, all epochs"].measured == pytest.approx(30 * 60)
    assert all(target.met for target in found.values())
    results["7M"]["full"] = runs(9.0, 9.0, 9.0)  # 1.11 times TRL
    assert [target.name for target in reward.targets(results) if not target.met] == ["full / TRL"]


def test_the_report_lists_every_kind_and_lines_up(reward, results):
    lines = reward.report(results).splitlines()
    assert "| 7M   | rrlhf, full         | 20 (20-25)     | 2x (1.6-3)      | 0.750             | 200      |" in lines
    assert sum(line.startswith("| 7M ") for line in lines) == 3 + 4 + 7
    assert len({len(line) for line in lines[:5]}) == 1


def test_the_exponent_is_that_between_the_two_largest_sizes():
    assert exponent((1, 10, 100), [50.0, 60.0, 600.0]) == "1.00"
    assert exponent((1, 10, 100), [1.0, 2.0]) == "0.30"  # the largest was left out
    assert exponent((1, 10), [0.0, 5.0]) == "–"
