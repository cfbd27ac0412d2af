import itertools
import json
import math
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from rrlhf.cli import app
from rrlhf.tools.sweeps.comparison import Interval
from rrlhf.tools.toy import world
from rrlhf.tools.toy.study import GOLD, SINGLE, Setting, arm_rewards, study, verdict
from rrlhf.tools.toy.world import expected, kl, learn, make_worlds, optimum, standardise, train


def reward_and_reference(seed=0):
    generator = torch.Generator().manual_seed(seed)
    reward, logits = torch.randn(2, 3, 4, generator=generator, dtype=torch.float64)
    return reward, logits.log_softmax(-1)


def value(log_policy, reward, reference, beta):
    return (expected(reward, log_policy) - beta * kl(log_policy, reference)).item()


def test_the_optimum_is_the_tilted_reference():
    reward, reference = reward_and_reference()
    best = optimum(reward, reference, 0.3)
    for x, y in itertools.product(range(3), range(4)):
        z = sum(math.exp(reference[x, j]) * math.exp(reward[x, j] / 0.3) for j in range(4))
        slow = math.exp(reference[x, y]) * math.exp(reward[x, y] / 0.3) / z
        assert best[x, y].exp().item() == pytest.approx(slow, abs=1e-12)


def test_no_other_policy_is_worth_more_than_the_optimum():
    reward, reference = reward_and_reference()
    best = value(optimum(reward, reference, 0.3), reward, reference, 0.3)
    generator = torch.Generator().manual_seed(1)
    for _ in range(200):
        other = torch.randn(3, 4, generator=generator, dtype=torch.float64).log_softmax(-1)
        assert value(other, reward, reference, 0.3) <= best


def test_training_reaches_the_optimum_of_its_own_reward():
    given = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    courses = list(train(given, 0.2, 600))
    reference, final = courses[0][1], courses[-1][1]
    assert courses[-1][0] == 600
    assert kl(optimum(given, reference, 0.2), final).max() < 0.01


def test_a_constant_reward_leaves_the_reference():
    courses = list(train(torch.zeros(1, 1, 8, 8), 0.2, 50))
    assert max(kl(log_policy, courses[0][1]).item() for _, log_policy in courses) < 0.01  # rounding, under Adam


@pytest.fixture
def briefly(monkeypatch):
    """Train the heads for a tenth of the time: what is asked holds at any step."""
    monkeypatch.setattr(world, "EPOCHS", 30)


def test_labels_everywhere_teach_every_ranking():
    worlds = make_worlds(2, 8, 8, labelled=1.0, interaction=1.0)
    reward = learn(worlds, 3).single
    order, truth = (each[..., :, None] > each[..., None, :] for each in (reward, worlds.gold))
    assert (order == truth).float().mean() > 0.97
    assert worlds.labelled.all()


def test_labels_of_a_seed_are_all_that_its_heads_see(briefly):
    """A world learns the same beside another one as alone, though all train together."""
    alone = make_worlds(1, 8, 8, labelled=0.5, interaction=1.0)
    both = make_worlds(2, 8, 8, labelled=0.5, interaction=1.0)
    torch.testing.assert_close(alone.gold[0], both.gold[0], atol=1e-6, rtol=0)
    swapped = both._replace(gold=torch.stack([both.gold[0], -both.gold[1]]))
    one, other = learn(both, 3), learn(swapped, 3)
    assert torch.allclose(one.single[0], other.single[0], atol=1e-5)
    assert not torch.allclose(one.single[1], other.single[1], atol=0.1)


def test_learned_scores_are_in_units_of_the_labelled_cells(briefly):
    worlds = make_worlds(2, 8, 8, labelled=0.5, interaction=1.0)
    found = learn(worlds, 3)
    for scores in (found.single[..., None], found.ensemble.mean):
        for seed in range(2):
            cells = scores[seed][worlds.labelled[seed]]
            assert cells.mean(0).abs().max() < 1e-5
            assert (cells.std(0) - 1).abs().max() < 1e-5
    assert (found.ensemble.std > 0).all()


def test_every_prompt_has_its_share_of_labels():
    assert (make_worlds(3, 8, 8, labelled=0.5, interaction=1.0).labelled.sum(-1) == 4).all()
    assert (make_worlds(3, 8, 8, labelled=0.0, interaction=1.0).labelled.sum(-1) == 2).all()


def test_standardising_keeps_the_order():
    mask = torch.ones(1, 2, 3, dtype=torch.bool)
    values = torch.tensor([[[1.0, 2, 3], [4, 5, 9]]])
    scaled = standardise(values, mask)
    assert torch.equal(scaled.flatten().argsort(), values.flatten().argsort())
    assert scaled.std().item() == pytest.approx(1)


@pytest.fixture(scope="module")
def small():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(world, "EPOCHS", 100)
        return study(Setting(seeds=2, steps=150, heads=3))


def test_the_policy_that_sees_gold_is_the_best_and_the_constant_one_stays(small):
    arms = small.arms
    assert max(arms, key=lambda name: arms[name].gold.mean) == GOLD
    assert arms[GOLD].optimum_kl.mean < 0.05
    assert arms["constant"].reference_kl.mean < 1e-4
    assert arms["constant"].gold.mean == pytest.approx(small.reference_gold.mean, abs=1e-3)
    assert arms[SINGLE].gold_over_single.mean == 0


def test_the_mixture_of_weight_zero_is_the_minimum(briefly):
    worlds = make_worlds(1, 8, 8, labelled=0.5, interaction=1.0)
    found = learn(worlds, 3)
    assert torch.allclose(arm_rewards(worlds, found)["robust 0"], found.ensemble.mean.amin(-1))


def test_the_verdict_follows_the_numbers(small):
    worse, better = Interval(-0.5, -0.6, -0.4, 9, "seeds"), Interval(0.5, 0.4, 0.6, 9, "seeds")
    arms = {name: replace(arm, gold_over_single=worse) for name, arm in small.arms.items()}
    arms["robust 0.4"] = replace(arms["robust 0.4"], gold_over_single=better)
    said = verdict(replace(small, arms=arms))[1]
    assert "better than the single head: robust 0.4;" in said
    assert "worse: robust 1, robust 0.8, robust 0.6, robust 0.2, robust 0, mean" in said


def test_the_command_writes_its_files_and_json(tmp_path, briefly):
    done = CliRunner().invoke(app, ["toy", "--seeds", "2", "--steps", "5", "--out", str(tmp_path), "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["setting"]["seeds"] == 2
    assert {path.name for path in tmp_path.iterdir()} == {"toy.json", "toy.png", "toy.svg"}
