"""Every detector fires on a training that goes wrong in its way, and is silent in healthy ones."""

import math
from functools import partial
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from hypothesis import given
from hypothesis import strategies as st

from rrlhf.models.load import load_base
from rrlhf.pipeline.params import load_params
from rrlhf.policy.checkpoint import Checkpoints
from rrlhf.policy.health import WINDOW, findings, hacking_suspected, is_healthy, suspected_at
from rrlhf.policy.learner import prepare_learner
from rrlhf.policy.reward import Prompts, load_reward_models
from rrlhf.policy.supervision import resumed, supervised
from rrlhf.stages.ppo import train

PARAMS = load_params(Path(__file__).parents[2])
PROMPTS = Prompts([[3, 9, 12], [4, 7, 8, 20, 21], [5, 30, 31, 32]])
HEALTHY = {"score": 0.1, "score_std": 0.5, "kl": 3.0, "response_tokens": 10.0, "entropy": 2.0, "finished": 0.8}
EXTRA = {"sigma": 0.3, "repetition": 0.02, "optimizer_steps": 8, "skipped_steps": 0}


def rows(*changes):
    return [HEALTHY | EXTRA | change for change in changes]


def names(found):
    return [finding.name for finding in found]


# Rules on logs


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("entropy_collapse", {"entropy": 0.03}),
        ("length_explosion", {"finished": 0.01, "response_tokens": 24.0}),
        ("dead_reward", {"score_std": 0.0}),
    ],
)
def test_a_lasting_sign_fires_after_patience_and_not_before(name, change):
    start, patience = rows({})[0], PARAMS.health.patience
    assert not is_healthy(rows(change)[0], start, PARAMS.health)
    assert names(findings(rows(*[{}] * 5, *[change] * patience), start, PARAMS.health)) == [name]
    assert findings(rows(*[{}] * 5, *[change] * (patience - 1)), start, PARAMS.health) == []
    assert findings(rows(*[change] * (patience - 1), {}, change), start, PARAMS.health) == []


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("nonfinite", {"kl": math.nan}),
        ("nonfinite", {"score": math.inf}),
        ("nonfinite", {"skipped_steps": 3}),
        ("nonfinite", {"skipped_steps": 1, "optimizer_steps": 0}),
        ("kl_blowup", {"kl": 51.0}),
    ],
)
def test_a_broken_update_fires_at_once(name, change):
    assert names(findings(rows({}, change), rows({})[0], PARAMS.health)) == [name]


def test_a_model_that_never_ended_its_responses_has_no_length_explosion():
    endless = rows(*[{"finished": 0.0}] * 10)
    assert findings(endless, endless[0], PARAMS.health) == []


@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=30), st.floats(0.2, 3), st.floats(0.3, 1))
def test_no_rule_fires_on_what_is_within_its_limits(kls, entropy, finished):
    log = rows(*({"kl": kl, "entropy": entropy, "finished": finished} for kl in kls))
    assert findings(log, rows({})[0], PARAMS.health) == []


def noisy(value, by, generator):
    return value + by * torch.randn((), generator=generator).item()


@pytest.mark.parametrize(
    ("drift", "suspected"),
    [
        ({"sigma": 0.6}, True),
        ({"response_tokens": 2.0}, True),
        ({"response_tokens": 20.0}, True),
        ({"repetition": 0.3}, True),
        ({"sigma": 0.1}, False),
        ({}, False),
    ],
)
def test_hacking_is_suspected_where_the_score_rises_and_something_drifts(drift, suspected):
    def log(seed, end):
        generator = torch.Generator().manual_seed(seed)
        return [
            {
                name: noisy(HEALTHY.get(name, EXTRA.get(name)) if n < WINDOW else value, 0.01, generator)
                for name, value in end.items()
            }
            for n in range(3 * WINDOW)
        ]

    end = {"score": 2.0, "sigma": 0.3, "response_tokens": 10.0, "repetition": 0.02} | drift
    assert bool(hacking_suspected(log(0, end))) is suspected
    assert hacking_suspected(log(0, end | {"score": 0.1})) is None  # without a higher score nothing was hacked


def test_hacking_can_be_suspected_from_the_sixth_rollout_on():
    log = rows(*[{}] * WINDOW, *[{"score": 2.0, "sigma": 0.4}] * WINDOW)
    assert "sigma from 0.30 to 0.40" in hacking_suspected(log).detail
    assert hacking_suspected(log[:-1]) is None
    assert suspected_at([row | {"step": n} for n, row in enumerate(log + log)]) == 5
    assert suspected_at([]) is None


# Real trainings


@pytest.fixture
def model(model):
    return model.model_copy(update={"base": "random:2x32"})


class Trained:
    """One supervised training, on a reward of the test's own."""

    def __init__(self, model, rewards, reward, folder, *, health=None, seed=0, harm=None, start=None, **changed):
        settings = {
            "updates": 8,
            "prompts_per_update": 16,
            "minibatch_size": 16,
            "epochs": 1,
            "train_layers": 1,
        } | changed
        ppo = PARAMS.ppo.model_copy(update=settings)
        self.health = PARAMS.health.model_copy(update={"checkpoint_every": 2} | (health or {}))
        torch.manual_seed(seed)
        engine = Accelerator(cpu=True)
        models = load_reward_models(*rewards, engine.device)
        self.learner = prepare_learner(engine, load_base(model), models, model=model, ppo=ppo, seed=seed)
        if start:
            start(self.learner)
        self.rows = []
        checkpoints = Checkpoints(folder, engine)
        history = resumed(self.learner, checkpoints, "ppo (test)")
        training = partial(train, self.learner, PROMPTS, reward)
        for row in supervised(training, self.learner, history, checkpoints, self.health):
            self.rows.append(row)
            if harm:
                harm(self.learner, row)
        self.events = [event.name for event in history.events]
        self.rollbacks, self.error = history.rollbacks, history.diverged


def random_reward(scores):
    return torch.randn(len(scores.single), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def likes_to_end(learner):
    """Have the random model end about every fourth response at each token."""
    network = learner.language.network
    tokens = torch.randint(3, 60, (64, 8), generator=torch.Generator().manual_seed(0))
    mean = network.model(tokens).last_hidden_state.mean((0, 1))
    network.lm_head.weight[learner.language.tokenizer.eos_token_id] = 3.5 * mean / mean.square().sum()


def test_a_reward_that_is_not_finite_diverges_after_its_rollbacks(model, rewards, tmp_path):
    def broken(scores):
        return torch.full((len(scores.single),), math.nan)

    done = Trained(model, rewards, broken, tmp_path, start=likes_to_end)
    assert done.events == ["nonfinite"] * 3
    assert "DIVERGED at step 2 after 2 rollbacks: nonfinite" in done.error
    assert done.rows[-1]["diverged"] == 1.0
    assert all(math.isfinite(value) for row in done.rows for value in row.values())


def test_one_bad_gradient_is_left_out_and_training_goes_on(model, rewards, tmp_path, monkeypatch):
    from rrlhf.stages import ppo

    calls, plain = [], ppo.clipped_policy_loss

    def sometimes_bad(*arguments):
        calls.append(1)
        return plain(*arguments) * (math.nan if len(calls) == 3 else 1.0)

    monkeypatch.setattr(ppo, "clipped_policy_loss", sometimes_bad)
    done = Trained(model, rewards, random_reward, tmp_path, minibatch_size=8, updates=4)
    assert [row["skipped_steps"] for row in done.rows] == [0, 1, 0, 0]
    assert [row["optimizer_steps"] for row in done.rows] == [2, 1, 2, 2]
    assert not done.error
    assert done.events == []
    assert all(weight.isfinite().all() for weight in done.learner.top.parameters())


def test_a_rollback_returns_to_the_good_weights_with_a_smaller_learning_rate(model, rewards, tmp_path):
    saved, wrecked = {}, []

    def wreck_once(learner, row):
        if row["step"] == 1:  # the checkpoint after two updates was just written
            saved.update({name: weight.clone() for name, weight in learner.top.state_dict().items()})
        if row["step"] == 2 and not wrecked:
            wrecked.append(1)
            with torch.no_grad():
                learner.top.norm.weight.mul_(100.0)

    done = Trained(
        model,
        rewards,
        random_reward,
        tmp_path,
        harm=wreck_once,
        updates=6,
        health={"max_token_kl": 3.0},
        start=likes_to_end,
    )
    assert done.events == ["kl_blowup"]
    assert done.rollbacks == [4]
    assert not done.error
    assert [row["step"] for row in done.rows] == list(range(8))  # two of eight rollouts were taken back
    rates = [row["learning_rate"] for row in done.rows]
    assert rates[4] == pytest.approx(rates[2] / 2)
    assert done.rows[3]["health_kl_blowup"] == 1.0
    assert done.rows[4]["kl"] < 1.0  # the first rollout after it was sampled by the good weights


def test_a_policy_that_is_sure_of_everything_has_an_entropy_collapse(model, rewards, tmp_path):
    def sharpen(learner, row):
        with torch.no_grad():
            learner.top.norm.weight.mul_(30.0)

    health = {"max_token_kl": 1e9, "rollbacks": 0, "patience": 2}
    done = Trained(model, rewards, random_reward, tmp_path, health=health, harm=sharpen, start=likes_to_end)
    assert "entropy_collapse" in done.error


def test_a_policy_that_is_paid_for_never_ending_has_a_length_explosion(model, rewards, tmp_path):
    def never_end(scores):
        return torch.full((len(scores.single),), -5.0)

    health = {"rollbacks": 0, "max_unfinished": 0.9, "patience": 2}
    done = Trained(
        model,
        rewards,
        never_end,
        tmp_path,
        health=health,
        start=likes_to_end,
        updates=60,
        prompts_per_update=32,
        minibatch_size=16,
        learning_rate=0.01,
        kl_weight=0.0,
    )
    assert done.rows[0]["finished"] > 0.4
    assert "length_explosion" in done.error


def test_a_constant_reward_is_dead(model, rewards, tmp_path):
    done = Trained(model, rewards, lambda scores: torch.full((16,), -1.0), tmp_path, health={"rollbacks": 1})
    assert done.events == ["dead_reward"] * 2
    assert "there is nothing to learn from" in done.error


@pytest.mark.parametrize("seed", [0, 1, 2, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(3, 10))])
def test_a_healthy_training_has_no_findings(model, rewards, tmp_path, seed):
    done = Trained(
        model,
        rewards,
        lambda scores: scores.single,
        tmp_path,
        seed=seed,
        start=likes_to_end,
        updates=20,
        missing_eos_score=0.0,
    )
    assert not done.error
    assert done.events == []
