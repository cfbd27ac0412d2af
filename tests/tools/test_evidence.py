"""What a sweep over seeds shows: paired differences, their correction, equal distances, fits and alarms."""

import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from rrlhf.judging.content import Measured
from rrlhf.judging.evaluation import Point
from rrlhf.located import ParamsError
from rrlhf.policy.reading import Reading
from rrlhf.robust import Scores
from rrlhf.stages.evaluate import gold_at_length
from rrlhf.tools.sweeps.comparison import Found, at_equal_kl, compared, evidence, holm, win_rate
from rrlhf.tools.sweeps.grid import experiments, load_experiment
from rrlhf.tools.sweeps.show import Sweep, as_markdown, tables, write

ROOT = Path(__file__).parents[2]
P_VALUES = st.lists(st.floats(0, 1), min_size=1, max_size=12)


def measured(mean):
    return Measured(mean, 0.1, 20)


def point(update, gold, kl=None):
    """One update; the proxy rises with the updates."""
    kl = float(update) if kl is None else kl
    return Point("", update, kl, float(update), 10.0, [], 1.0, gold / 2, gold, 0.1)


def seeds(policy, golds, **settings):
    return [Found({"seed": i, **settings}, policy, None, {"gold": measured(gold)}) for i, gold in enumerate(golds)]


def test_policies_are_paired_by_seed_and_the_interval_is_students_over_seeds():
    base, other = [1.0, 2.0, 4.0, 0.0], [1.5, 2.1, 4.9, 0.6]
    found = [*seeds("single", base), *reversed(seeds("robust", other))]  # in whatever order
    [row] = evidence(found, "single").paired
    differences = [b - a for a, b in zip(base, other, strict=True)]
    assert row.difference == pytest.approx(sum(differences) / 4)
    interval = stats.t.interval(0.95, 3, row.difference, stats.sem(differences))
    assert (row.low, row.high) == pytest.approx(interval)
    assert row.p == pytest.approx(stats.ttest_rel(other, base).pvalue) == row.p_holm


def test_a_setting_that_the_baseline_does_not_have_does_not_unpair_it():
    weights = {f"{w}": seeds("robust", [w, w + 1, w + 2.5], **{"arms.robust.nominal_weight": w}) for w in (0.0, 0.5)}
    rows = evidence([*seeds("single", [0.0, 1.0, 2.0]), *weights["0.0"], *weights["0.5"]], "single").paired
    assert [row.settings for row in rows] == [{"arms.robust.nominal_weight": w} for w in (0.0, 0.5)]
    assert [row.difference for row in rows] == pytest.approx([0.5 / 3, 0.5 + 0.5 / 3])
    assert all(row.seeds == 3 for row in rows)


def test_one_seed_has_a_difference_without_an_interval_and_a_diverged_policy_none():
    found = [*seeds("single", [1.0]), *seeds("robust", [2.0]), Found({"seed": 1}, "robust", None, None)]
    [row] = evidence(found, "single").paired
    assert (row.difference, row.p, row.p_holm, row.seeds) == (1.0, None, None, 1)
    assert math.isnan(row.low)


@given(P_VALUES)
def test_holm_is_between_no_correction_and_bonferronis_and_keeps_the_order(p_values):
    corrected = holm(p_values)
    for p, c in zip(p_values, corrected, strict=True):
        assert p <= c <= min(1.0, len(p_values) * p + 1e-12)
    pairs = sorted(zip(p_values, corrected, strict=True))
    assert all(a[1] <= b[1] for a, b in pairwise(pairs))


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])


def test_a_tie_is_half_a_win():
    assert win_rate([1.0, 2.0, 3.0, 0.0], [0.0, 2.0, 4.0, -1.0]) == 2.5 / 4


def test_at_equal_kl_the_one_that_went_further_is_read_where_the_other_stopped():
    near = [point(i, 0.1 * i) for i in range(11)]  # KL up to 10, gold .1 a nat
    far = [point(i, 0.02 * i, kl=2.0 * i) for i in range(21)]  # KL up to 40, gold .01 a nat
    assert at_equal_kl(near, far, "gold") == pytest.approx(9 * 0.1 - 9 * 0.01)  # the mean of the last three KLs is 9
    assert at_equal_kl(far, near, "gold") == pytest.approx(-9 * 0.09)
    assert at_equal_kl(far, [], "gold") is None


def reading(words, gold):
    none = torch.zeros(len(words))
    scores = Scores(none[:, None], none[:, None])
    texts = [" ".join(["word"] * n) for n in words]
    return Reading(texts, [True] * len(words), none, none, scores, {}, torch.tensor(gold), {}, 1)


def test_gold_at_the_starts_length_takes_off_what_length_alone_gains():
    """Gold is a policy's own level and .5 log(1 + words): at equal length the levels are left."""

    def judged(level, words):
        return reading(words, [level + 0.5 * math.log1p(n) for n in words])

    readings = {"sft": judged(0.0, [6, 9, 12]), "longer": judged(0.0, [20, 30]), "better": judged(1.0, [3, 4, 9])}
    found = {name: float(gold.mean()) for name, gold in gold_at_length(readings).items()}
    start = float(readings["sft"].gold.mean())
    assert found == pytest.approx({"sft": start, "longer": start, "better": start + 1}, abs=1e-5)


def test_an_alarm_has_a_lead_where_gold_fell_and_is_false_where_it_did_not():
    up = [point(i, 0.1 * i) for i in range(20)]
    fell = [point(i, 2.0 - 0.3 * abs(i - 8)) for i in range(20)]  # clearly below its peak some updates after it
    runs = [(up, None), (up, 5), (fell, 7), (fell, 19), (fell, None)]
    found = [
        Found({"seed": i}, "robust", None, {"gold": measured(0.0)}, curve=curve, alarm=alarm)
        for i, (curve, alarm) in enumerate(runs)
    ]
    [alarm] = evidence(found, "single").alarms
    assert (alarm.seeds, alarm.fell, alarm.warned, alarm.false) == (5, 3, 1, 1)
    assert alarm.leads == [3]  # the means of three fall clearly below that around 8 at 10


def test_gold_that_ends_below_the_starts_fell_by_the_last_update():
    flat = [point(i, 1.0) for i in range(20)]
    starts = seeds("sft", [1.0, 1.0, 1.0])
    ends = [(0.5, 12), (0.8, 12), (0.5, None)]  # .1 is a standard error: .5 below is clear, .2 below is not
    found = [
        Found({"seed": i}, "single", None, {"gold": measured(gold)}, curve=flat, alarm=alarm)
        for i, (gold, alarm) in enumerate(ends)
    ]
    [alarm] = evidence([*starts, *found], "single").alarms
    assert (alarm.fell, alarm.warned, alarm.leads, alarm.false) == (2, 1, [7], 1)


def test_tables_and_pictures_show_it(tmp_path):
    found = [
        Found(
            {"seed": i}, policy, None, {"gold": measured(gold)}, [gold, gold + i], [point(u, gold) for u in range(6)], 3
        )
        for policy, gold in (("single", 1.0), ("robust", 2.0))
        for i in range(3)
    ]
    told = Sweep("x", {"seed": [0, 1, 2]}, {}, compared(found), evidence(found, "single"))
    titles = [each.title for each in tables(told, ["gold"])]
    assert titles[1] == "robust less single, seed by seed"
    assert "| win rate | +1.00 | +1.00 to +1.00 |" in as_markdown(told)
    names = [path.name for path in write(told, found, tmp_path)]
    assert names == ["sweep.json", "courses.png", "courses.svg", "sweep.md"]


@pytest.mark.parametrize("name", experiments(ROOT))
def test_every_experiment_can_be_run_as_it_is_written(name):
    """Its settings and every point of its grid are what params.yaml may hold, and its baseline is one of its arms."""
    from rrlhf.pipeline.params import load_params
    from rrlhf.tools.sweeps.grid import points

    found = load_experiment(ROOT, name)
    params = load_params(ROOT, found.profile, found.settings)
    assert found.baseline in params.arms
    for each in points(found.sweep, params):
        load_params(ROOT, found.profile, {**found.settings, **each.overrides})


def test_mistakes_in_an_experiment_are_told_all_at_once(tmp_path):
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "wrong.yaml").write_text("question: why?\nprofil: tiny\nsweep: [1]\n", encoding="utf-8")
    with pytest.raises(ParamsError) as told:
        load_experiment(tmp_path, "wrong")
    for part in ("wrong.yaml", "baseline", "profil\n", "sweep"):
        assert part in str(told.value)
    (tmp_path / "experiments" / "twice.yaml").write_text("baseline: a\nbaseline: b\nquestion: q\nsweep: {seed: [1]}\n")
    with pytest.raises(ParamsError, match=r"twice.yaml:2: baseline is given twice"):
        load_experiment(tmp_path, "twice")
    with pytest.raises(ParamsError, match="did you mean wrong"):
        load_experiment(tmp_path, "worng")


def test_the_command_lists_experiments_and_refuses_what_cannot_be_meant(typed, monkeypatch):
    monkeypatch.chdir(ROOT)
    code, out, _ = typed("experiment")
    assert code == 0
    assert {line.partition(":")[0] for line in out.splitlines()} == set(experiments(ROOT))
    for wrong, told in (
        (["robst"], "did you mean robust"),
        (["robust", "--set", "ppo.updats=3"], "did you mean updates"),
    ):
        code, _, err = typed("experiment", *wrong)
        assert code == 2
        assert told in err
    code, _, err = typed("sweep", "seed=1,2", "--profile", "tiny", "--baseline", "nobody")
    assert code == 2
    assert "unknown policy 'nobody' to compare with" in err
