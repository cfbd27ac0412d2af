import json
import math
from dataclasses import asdict

import pytest
import torch

from rrlhf.judging.calibration import measured_share
from rrlhf.judging.metrics import (
    LEVELS,
    PairScores,
    agreement_with_gold,
    heldout_metrics,
    judge_ensemble,
    judge_single,
    log_odds,
    score_pairs,
)
from rrlhf.losses import gaussian_bradley_terry
from rrlhf.rewards.heads import Pairs, RewardHeads
from rrlhf.robust import READINGS, Scores


def drawn(rows, heads, seed=0, std=0.5):
    generator = torch.Generator().manual_seed(seed)
    mean = torch.randn(rows, heads, generator=generator)
    return Scores(mean, torch.rand(rows, heads, generator=generator) * std + 0.1)


def pair_scores(pairs=300, heads=4, **changes):
    given = PairScores(
        drawn(pairs, heads), drawn(pairs, heads, seed=1), torch.full((heads,), 0.7), torch.arange(pairs) // 3
    )
    return given._replace(**changes)


def test_every_reading_is_as_accurate_as_counting_says():
    pairs = pair_scores()
    judged = judge_ensemble("five", pairs)
    assert (judged.name, judged.pairs, judged.prompts) == ("five", 300, 100)
    for name, read in READINGS.items():
        wins = (read(pairs.chosen) > read(pairs.rejected)).float()
        found = judged.accuracy[name]
        assert found.mean == pytest.approx(wins.mean().item())
        assert found.low < found.mean < found.high
        assert found.n == 100


def test_log_odds_are_those_of_the_heads_average_probability_in_raw_units():
    heads = RewardHeads(6, 3, 0, 0.05).eval()
    one, other = torch.randn(2, 40, 6, generator=torch.Generator().manual_seed(2))
    heads.normalise(torch.cat([one, other]))
    pairs = score_pairs(heads, Pairs(one, other), torch.arange(40))
    with torch.no_grad():
        raw = (-gaussian_bradley_terry(heads(one), heads(other))).exp().mean(1)
    assert log_odds(pairs).sigmoid().float() == pytest.approx(raw, abs=1e-6)


def test_log_odds_stay_finite_and_antisymmetric_where_probabilities_do_not():
    sure = Scores(torch.full((1, 2), 500.0), torch.zeros(1, 2))
    unsure = Scores(torch.full((1, 2), -500.0), torch.zeros(1, 2))
    there = log_odds(PairScores(sure, unsure, torch.ones(2), torch.zeros(1)))
    back = log_odds(PairScores(unsure, sure, torch.ones(2), torch.zeros(1)))
    assert there.item() == pytest.approx(1000)
    assert back.item() == pytest.approx(-1000)


def test_a_single_head_orders_by_its_mean_and_is_as_sure_as_its_sigma_says():
    pairs = pair_scores(heads=1)
    wild = pairs._replace(chosen=Scores(pairs.chosen.mean, pairs.chosen.std * 100))
    assert judge_single("one", pairs).accuracy == judge_single("one", wild).accuracy
    assert (log_odds(wild).abs() < log_odds(pairs).abs()).all()
    assert judge_single("one", pairs).heads is None
    assert log_odds(pairs._replace(scale=torch.ones(1))).shape == (300,)


def test_the_order_of_pairs_changes_nothing():
    pairs = pair_scores()
    order = torch.randperm(300, generator=torch.Generator().manual_seed(3))
    shuffled = PairScores(
        pairs.chosen.of(order.tolist()),
        pairs.rejected.of(order.tolist()),
        pairs.scale,
        pairs.prompts[order],
    )
    assert flat(asdict(judge_ensemble("a", shuffled))) == pytest.approx(
        flat(asdict(judge_ensemble("a", pairs))), abs=1e-6
    )


def flat(value):
    if isinstance(value, dict):
        return [number for item in value.values() for number in flat(item)]
    if isinstance(value, list):
        return [number for item in value for number in flat(item)]
    return [value] if isinstance(value, int | float) else []


def test_heads_that_share_a_truth_cover_each_other_as_their_sigma_says():
    """Margins t + s e_i: two heads differ by sqrt(2) s, so intervals of sqrt(2) s hold as often as they say."""
    generator = torch.Generator().manual_seed(4)
    truth = torch.randn(40_000, 1, generator=generator)
    mean = truth + 0.3 * torch.randn(40_000, 3, generator=generator)
    chosen = Scores(mean, torch.full_like(mean, 0.3 * 2**0.5))
    rejected = Scores(torch.zeros_like(mean), torch.zeros_like(mean))
    found = judge_ensemble("honest", PairScores(chosen, rejected, torch.ones(3), torch.arange(40_000))).heads
    assert [row.level for row in found.coverage] == list(LEVELS)
    for row in found.coverage:
        assert row.share.mean == pytest.approx(row.level, abs=0.01)
        assert row.share.n == 40_000


def test_spread_that_grows_with_mistakes_warns():
    margin = torch.tensor([2.0, 1.0, -1.0, -2.0])
    chosen = Scores(
        margin[:, None] + torch.tensor([0.125, 0.125, 3.0, 3.0])[:, None] * torch.tensor([-1.0, 1.0]), torch.ones(4, 2)
    )
    rejected = Scores(torch.zeros(4, 2), torch.ones(4, 2))
    heads = judge_ensemble("w", PairScores(chosen, rejected, torch.ones(2), torch.arange(4))).heads
    assert heads.spread_warns == pytest.approx(1, abs=1e-6)
    assert heads.sigma_warns is None  # the same sigma everywhere tells nothing


def test_gold_is_covered_where_the_ensemble_is_honest_and_not_where_it_hides_its_doubt():
    generator = torch.Generator().manual_seed(5)
    gold = torch.randn(20_000, generator=generator)
    mean = (gold + 0.5 * torch.randn(20_000, generator=generator))[:, None].expand(-1, 2)
    start, prompts = torch.randn(20_000, generator=generator), torch.arange(20_000) // 2
    for std, matches in ((0.5, True), (0.1, False)):
        found = agreement_with_gold("p", Scores(mean, torch.full_like(mean, std)), 5 * gold + 2, 5 * start + 2, prompts)
        for row in found.coverage:
            assert (abs(row.share.mean - row.level) < 0.02) == matches
        assert found.rank_correlation == pytest.approx(0.89, abs=0.02)


def test_flat_metrics_have_no_unknown_number():
    judged = judge_ensemble("a", pair_scores(pairs=2, prompts=torch.tensor([0, 0])))
    metrics = heldout_metrics(judged)
    assert all(math.isfinite(value) for value in metrics.values())
    assert {"heldout_accuracy_worst", "heldout_ece", "head_correlation", "head_spread", "head_std"} <= set(metrics)
    single = heldout_metrics(judge_single("one", pair_scores(heads=1)))
    assert {"heldout_accuracy", "heldout_accuracy_stderr", "heldout_nll"} <= set(single)


def test_judgements_are_strict_json_and_shares_group_by_prompt():
    judged = asdict(judge_ensemble("a", pair_scores()))
    assert json.loads(json.dumps(judged, allow_nan=False)) == judged
    found = measured_share(torch.tensor([1.0, 1.0, 0.0]), torch.tensor([0, 0, 1]))
    assert (found.mean, found.n) == (0.5, 2)
