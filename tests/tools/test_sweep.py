"""Grids: their points, what the points share, and the rows and intervals of the comparison."""

import json
from pathlib import Path

import pytest
from scipy import stats

from rrlhf.judging.content import Measured
from rrlhf.located import ParamsError
from rrlhf.pipeline.graph import nodes
from rrlhf.pipeline.params import load_params
from rrlhf.tools.sweeps.comparison import Found, compared
from rrlhf.tools.sweeps.grid import name_of, parse_grid, points, relevant, shares, trimmed
from rrlhf.tools.sweeps.show import Sweep, label, write

ROOT = Path(__file__).parents[2]


def asked(*texts):
    return points(parse_grid(texts), load_params(ROOT, "tiny"))


def graphs(found):
    return [nodes(load_params(ROOT, "tiny", point.overrides)) for point in found]


def measured(mean, stderr=0.1, n=20):
    return Measured(mean, stderr, n)


def test_values_are_yaml_and_every_combination_is_a_point():
    assert parse_grid(["ppo.kl_weight=0, 0.1", "ppo.kl_in=[reward, loss]"]) == {
        "ppo.kl_weight": [0, 0.1],
        "ppo.kl_in": ["reward", "loss"],
    }
    found = asked("ppo.kl_weight=0,0.1", "ppo.updates=1,2,3")
    assert len(found) == 6
    assert found[1].settings == found[1].overrides == {"ppo.kl_weight": 0, "ppo.updates": 2}


@pytest.mark.parametrize("text", ["ppo.kl_weight", "=1,2", "ppo.kl_weight=", "ppo.kl_weight=[1"])
def test_what_is_no_grid_is_refused_with_an_example(text):
    with pytest.raises(ParamsError, match=r"arms\.robust\.nominal_weight=0,0\.2"):
        parse_grid([text])


def test_settings_and_values_come_once():
    with pytest.raises(ParamsError, match="swept twice"):
        parse_grid(["ppo.updates=1", "ppo.updates=2"])
    with pytest.raises(ParamsError, match="given twice"):
        asked("ppo.updates=1,1")


def test_a_star_means_the_arms_that_have_the_setting():
    [point] = asked("arms.*.nominal_weight=0.3")
    assert point.overrides == {"arms.robust.nominal_weight": 0.3, "arms.choosy.nominal_weight": 0.3}
    [point] = asked("arms.*.seed=5")
    assert set(point.overrides) == {f"arms.{name}.seed" for name in ("single", "robust", "direct", "choosy")}
    with pytest.raises(ParamsError, match="no arm"):
        asked("arms.*.temperature=1")


@pytest.mark.parametrize(
    ("texts", "changes"),
    [
        (["arms.robust.nominal_weight=0,1"], {"ppo-robust": ["arms.robust.nominal_weight"]}),
        (["ppo.updates=1,2"], {"ppo-robust": ["ppo.updates"], "ppo-single": ["ppo.updates"]}),
        (["sft.epochs=1,2"], dict.fromkeys(["sft", "ppo-robust", "ppo-single", "dpo-direct", "best_of_n-choosy"])),
        (["ensemble.heads=2,3"], dict.fromkeys(["ppo-robust", "ppo-single", "best_of_n-choosy"])),
    ],
)
def test_a_setting_changes_the_policies_that_are_made_with_it(texts, changes):
    found = asked(*texts)
    told = {name: paths for name, paths in relevant(found, graphs(found)).items() if paths}
    assert told == {name: paths or [texts[0].partition("=")[0]] for name, paths in changes.items()}


def test_every_policy_belongs_to_the_first_point_that_has_it():
    found = asked("arms.robust.nominal_weight=0,1", "arms.single.seed=1,2")
    new = [set(each) for each in shares(found, graphs(found))]
    assert new[0] == {"sft", "ppo-single", "ppo-robust", "dpo-direct", "best_of_n-choosy"}
    assert new[1:] == [{"ppo-single"}, {"ppo-robust"}, set()]


def test_a_grid_that_changes_no_policy_is_refused():
    found = asked("evaluate.samples_per_prompt=1,2")
    with pytest.raises(ParamsError, match="no policy depends on it"):
        shares(found, graphs(found))


def test_a_trimmed_graph_compares_what_is_left():
    graph = trimmed(nodes(load_params(ROOT, "tiny")), {"ppo-single", "dpo-direct"})
    assert {"ppo-single", "dpo-direct"} & {node.name for node in graph} == set()
    assert {"ppo-robust", "best_of_n-choosy", "sft", "data"} <= set(graph[-1].inputs.values())
    assert "ppo-single" not in graph[-1].inputs.values()


def test_seeds_are_one_row_with_students_interval_over_seeds():
    golds = [1.0, 2.0, 4.0]
    found = [
        Found(
            {"arms.robust.nominal_weight": 0.4, "arms.robust.seed": seed},
            "robust",
            f"rrlhf-policy/{seed}",
            {"gold": measured(gold)},
        )
        for seed, gold in enumerate(golds)
    ]
    [row] = compared(found)
    assert (row.seeds, row.settings) == (3, {"arms.robust.nominal_weight": 0.4})
    interval = row.metrics["gold"]
    assert (interval.low, interval.high) == pytest.approx(stats.t.interval(0.95, 2, 7 / 3, stats.sem(golds)))
    assert (interval.n, interval.over) == (3, "seeds")
    assert "3 seeds" in label(row)


def test_a_single_seed_has_the_interval_over_prompts():
    [row] = compared([Found({}, "sft", None, {"gold": measured(1.0, 0.2, 16)})])
    interval = row.metrics["gold"]
    assert interval.high - 1.0 == pytest.approx(stats.t.ppf(0.975, 15) * 0.2)
    assert interval.over == "prompts"


def test_a_policy_that_diverged_is_counted_and_has_no_numbers():
    settings = {"ppo.learning_rate": 1.0}
    [row] = compared([Found(settings, "robust", None, None)])
    assert row.diverged == 1
    assert row.metrics == {}
    assert "1 diverged" in label(row)


def test_a_sweep_is_written_as_json_and_markdown(tmp_path):
    numbers = [Found({"ppo.kl_weight": value}, "robust", "v", {"gold": measured(value)}) for value in (0, 0.1)]
    base = [Found({}, "sft", "v", {"gold": measured(0.3, float("nan"), 1), "proxy": measured(0.1)})]
    told = Sweep(name_of("tiny", {}, {}), {}, {}, compared(base + numbers))
    names = [path.name for path in write(told, numbers, tmp_path / "sweep")]
    assert names == ["sweep.json", "sweep.md"]
    assert json.loads((tmp_path / "sweep" / "sweep.json").read_text()) == told.content()
    assert told.content()["rows"][0]["metrics"]["gold"]["low"] is None
