import math

import pytest
import torch
from accelerate import Accelerator

from rrlhf.config import Arm, Model, Ppo
from rrlhf.models import load_base
from rrlhf.ppo import Judgement, arm_reward, collect, optimise, prepare_learner, train
from rrlhf.reward_models.heads import RewardHeads
from rrlhf.reward_models.trunk import FILE
from rrlhf.robust import AGGREGATIONS, Scores

PROMPTS = [[3, 9, 12], [4, 7, 8, 20, 21], [5, 30, 31, 32]]


@pytest.fixture
def model():
    return Model(
        base="random:3x32",
        revision=None,
        device="cpu",
        dtype="float32",
        system_prompt="",
        prompt_tokens=64,
        response_tokens=6,
    )


@pytest.fixture
def ppo():
    return Ppo(
        updates=3,
        prompts_per_update=8,
        responses_per_prompt=1,
        minibatch_size=4,
        microbatch_size=64,
        epochs=2,
        train_layers=2,
        learning_rate=1e-3,
        kl_weight=0.05,
        kl_estimator="k1",
        kl_in="reward",
        kl_target=None,
        kl_horizon=80,
        max_kl=None,
        estimator="gae",
        gae_lambda=0.95,
        clip_ratio=0.2,
        clip_value=0.2,
        value_weight=0.1,
        max_grad_norm=1.0,
        missing_eos_score=-1.0,
        max_step_kl=10.0,
    )


@pytest.fixture
def rewards(tmp_path):
    """A folder with a single head and one with five, both with random weights."""
    for name, heads in (("reward", 1), ("ensemble", 5)):
        folder = tmp_path / name
        folder.mkdir()
        torch.manual_seed(heads)
        RewardHeads(32, heads, 0, 0.05).save(folder)
        (folder / FILE).write_text('{"layer": 1}')
    return tmp_path / "reward", tmp_path / "ensemble"


def learner(model, ppo, rewards, seed=0):
    torch.manual_seed(seed)
    return prepare_learner(Accelerator(cpu=True), load_base(model), model, ppo, seed, *rewards)


def trained(model, ppo, rewards, reward, seed=0):
    found = learner(model, ppo, rewards, seed)
    kept = []
    rows = list(train(found, PROMPTS, reward, model, ppo, seed, kept))
    return found, rows, kept


def single(judgement):
    return judgement.single


@pytest.mark.parametrize(
    ("reward", "settings"),
    [
        ("robust", {"nominal_weight": 0.4}),
        ("batch_robust", {"nominal_weight": 0.4}),
        ("uwo", {"uncertainty_weight": 0.1}),
        ("entropic", {"temperature": 0.5}),
        ("median", {}),
    ],
)
def test_an_arm_sees_the_reward_that_it_names(reward, settings):
    judgement = Judgement(torch.randn(4), Scores(torch.randn(4, 3), torch.rand(4, 3)))
    seen = arm_reward(Arm(reward=reward, seed=1, **settings), Accelerator(cpu=True))(judgement)
    assert torch.equal(seen, AGGREGATIONS[reward](judgement.ensemble, **settings))


def test_the_single_reward_reads_no_ensemble():
    judgement = Judgement(torch.randn(4), Scores(torch.randn(4, 3), torch.rand(4, 3)))
    assert torch.equal(arm_reward(Arm(reward="single", seed=1), Accelerator(cpu=True))(judgement), judgement.single)


def test_the_first_minibatch_has_ratio_one_and_no_kl_to_the_reference(model, ppo, rewards):
    found = learner(model, ppo, rewards)
    rollout, _, _, metrics = collect(found, PROMPTS, single, model, ppo)
    logprobs, values = found.policy(rollout.hidden, rollout.prompt_lengths, rollout.responses, rollout.mask)
    assert (((logprobs - rollout.logprobs) * rollout.mask).exp() - 1).abs().max() < 1e-4
    torch.testing.assert_close(values * rollout.mask, rollout.values, atol=1e-5, rtol=1e-4)
    assert abs(metrics["kl"]) < 1e-4


@pytest.mark.parametrize(("epochs", "minibatch"), [(1, 8), (2, 4), (3, 2)])
def test_optimizer_steps_are_epochs_times_minibatches(model, ppo, rewards, epochs, minibatch):
    ppo = ppo.model_copy(update={"epochs": epochs, "minibatch_size": minibatch})
    found = learner(model, ppo, rewards)
    rollout, *_ = collect(found, (PROMPTS * 3)[:8], single, model, ppo)
    assert optimise(found, rollout, model, ppo)["optimizer_steps"] == epochs * 8 // minibatch


def test_accumulated_gradients_train_the_same_policy(model, ppo, rewards):
    def weights(size):
        found, rows, _ = trained(model, ppo.model_copy(update={"microbatch_size": size}), rewards, single)
        return found.language.network.model.layers[2].mlp.up_proj.weight, rows

    (whole, rows), (parts, part_rows) = weights(64), weights(3)
    torch.testing.assert_close(parts, whole, atol=1e-5, rtol=1e-4)
    assert part_rows[-1]["policy_loss"] == pytest.approx(rows[-1]["policy_loss"], abs=1e-4)


def test_a_far_step_ends_the_epochs_of_an_update(model, ppo, rewards):
    ppo = ppo.model_copy(update={"epochs": 5, "max_step_kl": 1e-9})
    found = learner(model, ppo, rewards)
    rollout, *_ = collect(found, (PROMPTS * 3)[:8], single, model, ppo)
    assert optimise(found, rollout, model, ppo)["optimizer_steps"] == 2


def test_the_same_seed_trains_the_same_weights_and_another_seed_others(model, ppo, rewards):
    def weights(seed):
        found, _, kept = trained(model, ppo, rewards, single, seed)
        return found.language.network.model.layers[2].mlp.up_proj.weight, kept

    one, texts = weights(0)
    again, same_texts = weights(0)
    assert torch.equal(one, again)
    assert texts == same_texts
    assert not torch.equal(one, weights(1)[0])


def test_only_the_top_layers_train(model, ppo, rewards):
    start = load_base(model).network.state_dict()
    found, _, _ = trained(model, ppo, rewards, single)
    changed = {
        name for name, tensor in found.language.network.state_dict().items() if not torch.equal(tensor, start[name])
    }
    assert changed
    assert all(name.startswith(("model.layers.1.", "model.layers.2.", "model.norm")) for name in changed)


def test_every_response_is_kept_with_its_scores(model, ppo, rewards):
    _, rows, kept = trained(model, ppo, rewards, single)
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert len(kept) == 3 * 8
    assert all(len(row.heads) == 5 and 0 <= row.prompt < 3 for row in kept)
    by_hand = sum(row.proxy for row in kept if row.update == 1) / 8
    assert rows[1]["proxy"] == pytest.approx(by_hand, abs=1e-5)
    assert all(math.isfinite(value) for row in rows for value in row.values())


def test_a_response_without_an_end_gets_the_penalty_instead_of_its_score(model, ppo, rewards):
    found = learner(model, ppo.model_copy(update={"kl_weight": 0.0, "gae_lambda": 1.0}), rewards)
    rollout, judgement, samples, _ = collect(
        found, PROMPTS * 10, single, model, ppo.model_copy(update={"kl_weight": 0.0, "gae_lambda": 1.0})
    )
    expected = torch.where(samples.finished, judgement.single, -1.0)
    torch.testing.assert_close(rollout.returns[:, 0], expected, atol=1e-5, rtol=1e-4)


def test_training_the_reward_trunk_is_refused(model, ppo, rewards):
    with pytest.raises(ValueError, match=r"at most 2 layers can train"):
        learner(model, ppo.model_copy(update={"train_layers": 3}), rewards)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_ppo_reaches_the_optimum_of_a_one_token_reward(model, ppo, rewards, seed):
    """With reward 1 for one first token and no KL term, the policy ends up choosing it."""
    model = model.model_copy(update={"response_tokens": 1})
    ppo = ppo.model_copy(
        update={"updates": 100, "prompts_per_update": 64, "minibatch_size": 64, "kl_weight": 0.0, "learning_rate": 0.01}
    )
    found = learner(model, ppo, rewards, seed)
    with torch.no_grad():
        found.top.unembed.weight.mul_(8)  # it does not train; at its initial scale no policy could be sure
    eos = found.language.tokenizer.eos_token_id
    rows = list(train(found, PROMPTS, lambda judgement: torch.ones(len(judgement.single)), model, ppo, seed, []))
    with torch.no_grad():
        logits = found.language.network(torch.tensor([PROMPTS[0]])).logits[0, -1]
    assert logits.argmax() == eos  # ending at once is rewarded with 1, anything else with -1
    assert rows[-1]["finished"] > 0.9 > rows[0]["finished"]
