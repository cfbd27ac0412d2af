import math

import pytest
import torch
from accelerate import Accelerator

from rrlhf.config import typed_arm
from rrlhf.kl import adapted_weight
from rrlhf.models.adapters import merged
from rrlhf.models.load import load_base
from rrlhf.policy.learner import prepare_learner
from rrlhf.policy.reward import Prompts, RewardScores, arm_reward, load_reward_models
from rrlhf.robust import AGGREGATIONS, Scores
from rrlhf.stages.ppo import collect, optimise, train

WAYS = [{"trains": "layers"}, {"trains": "layers", "train_layers": 3}, {"trains": "lora"}, {"trains": "full"}]
PROMPTS = [[3, 9, 12], [4, 7, 8, 20, 21], [5, 30, 31, 32]]
EIGHT = [0, 1, 2, 0, 1, 2, 0, 1]  # rows of prompts


def learner(model, ppo, rewards, seed=0):
    torch.manual_seed(seed)
    models = load_reward_models(*rewards, torch.device("cpu"))
    return prepare_learner(Accelerator(cpu=True), load_base(model), models, model=model, ppo=ppo, seed=seed)


def rollout_of(found, asked=(0, 1, 2)):
    """What `collect` returns for some of the prompts, paid by the single head."""
    return collect(found, Prompts(PROMPTS), asked, single)


def trained(model, ppo, rewards, reward, seed=0):
    found = learner(model, ppo, rewards, seed)
    rows, responses = zip(*train(found, Prompts(PROMPTS), reward), strict=True)
    return found, rows, [response for some in responses for response in some]


def single(scores):
    return scores.single


@pytest.mark.parametrize(
    ("reward", "settings"),
    [
        ("robust", {"nominal_weight": 0.4, "credible": 2.0}),
        ("batch_robust", {"nominal_weight": 0.4, "credible": 2.0}),
        ("uwo", {"uncertainty_weight": 0.1}),
        ("entropic", {"temperature": 0.5}),
        ("median", {}),
    ],
)
def test_an_arm_sees_the_reward_that_it_names(reward, settings):
    scores = RewardScores(torch.randn(4), Scores(torch.randn(4, 3), torch.rand(4, 3)))
    seen = arm_reward(typed_arm(reward=reward, seed=1, **settings), Accelerator(cpu=True))(scores)
    assert torch.equal(seen, AGGREGATIONS[reward](scores.ensemble, **settings))


def test_the_single_reward_reads_no_ensemble():
    scores = RewardScores(torch.randn(4), Scores(torch.randn(4, 3), torch.rand(4, 3)))
    assert torch.equal(arm_reward(typed_arm(reward="single", seed=1), Accelerator(cpu=True))(scores), scores.single)


@pytest.mark.parametrize("trains", WAYS)
def test_the_first_minibatch_has_ratio_one_and_no_kl_to_the_reference(model, ppo, rewards, trains):
    ppo = ppo.model_copy(update=trains)
    found = learner(model, ppo, rewards)
    rollout, _, metrics = rollout_of(found)
    logprobs, values = found.policy(rollout.entering, rollout.prompt_lengths, rollout.responses, rollout.mask)
    assert (((logprobs - rollout.logprobs) * rollout.mask).exp() - 1).abs().max() < 1e-4
    torch.testing.assert_close(values * rollout.mask, rollout.values, atol=1e-5, rtol=1e-4)
    assert abs(metrics["kl"]) < 1e-4


@pytest.mark.parametrize(("epochs", "minibatch"), [(1, 8), (2, 4), (3, 2)])
def test_optimizer_steps_are_epochs_times_minibatches(model, ppo, rewards, epochs, minibatch):
    ppo = ppo.model_copy(update={"epochs": epochs, "minibatch_size": minibatch})
    found = learner(model, ppo, rewards)
    rollout, *_ = rollout_of(found, EIGHT)
    assert optimise(found, rollout)["optimizer_steps"] == epochs * 8 // minibatch


@pytest.mark.parametrize("trains", WAYS)
def test_accumulated_gradients_train_the_same_policy(model, ppo, rewards, trains):
    def weights(tokens):
        found, rows, _ = trained(model, ppo.model_copy(update={"microbatch_tokens": tokens, **trains}), rewards, single)
        return torch.cat([weight.flatten() for weight in found.top.parameters() if weight.requires_grad]), rows

    (whole, rows), (parts, part_rows) = weights(4096), weights(20)
    torch.testing.assert_close(parts, whole, atol=1e-5, rtol=1e-4)
    assert part_rows[-1]["policy_loss"] == pytest.approx(rows[-1]["policy_loss"], abs=1e-4)


def test_a_far_step_ends_the_epochs_of_an_update(model, ppo, rewards):
    ppo = ppo.model_copy(update={"epochs": 5, "max_step_kl": 1e-9})
    found = learner(model, ppo, rewards)
    rollout, *_ = rollout_of(found, EIGHT)
    assert optimise(found, rollout)["optimizer_steps"] == 2


@pytest.mark.parametrize("trains", WAYS)
def test_the_same_seed_trains_the_same_weights_and_another_seed_others(model, ppo, rewards, trains):
    def weights(seed):
        found, _, kept = trained(model, ppo.model_copy(update=trains), rewards, single, seed)
        return torch.cat([weight.flatten() for weight in found.top.parameters()]), kept

    one, texts = weights(0)
    again, same_texts = weights(0)
    assert torch.equal(one, again)
    assert texts == same_texts
    assert not torch.equal(one, weights(1)[0])


@pytest.mark.parametrize("trains", WAYS)
def test_every_way_of_training_pays_the_same_reward_for_the_same_response(model, ppo, rewards, trains):
    """The reward heads read the SFT model's states, wherever these come from, and never the trained policy's."""
    plain = rollout_of(learner(model, ppo, rewards))[1]
    settings = ppo.model_copy(update=trains)
    found = learner(model, settings, rewards)
    with torch.no_grad():
        for weight in found.top.layers.parameters():
            if weight.requires_grad:
                weight.mul_(1.0 + 1e-4)
    for response, expected in zip(rollout_of(found)[1], plain, strict=True):
        assert response.heads == pytest.approx(expected.heads, abs=1e-5, rel=1e-4)


def test_everything_trains_in_full_and_only_adapters_in_lora(model, ppo, rewards):
    start = load_base(model).network.state_dict()

    def changed(trains):
        found, _, _ = trained(model, ppo.model_copy(update={"trains": trains}), rewards, single)
        now = merged(found.language).network.state_dict()
        assert now.keys() == start.keys()
        return {name for name in now if not torch.equal(now[name], start[name])}

    assert changed("full") == set(start)
    maps = {f"model.layers.{layer}.self_attn.{name}.weight" for layer in (1, 2) for name in ("q_proj", "v_proj")}
    assert changed("lora") == maps


def test_merged_adapters_give_the_trained_policy(model, ppo, rewards):
    found, _, _ = trained(model, ppo.model_copy(update={"trains": "lora"}), rewards, single)
    tokens, network = torch.tensor([PROMPTS[1]]), found.language.network
    with torch.no_grad():
        trained_logits, start = network(tokens).logits, load_base(model).network(tokens).logits
        network = merged(found.language).network
        torch.testing.assert_close(network(tokens).logits, trained_logits, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(trained_logits, start, atol=1e-3)


def test_packing_by_tokens_covers_every_row_once_within_the_limit(model, ppo, rewards):
    rollout, *_ = rollout_of(learner(model, ppo, rewards), EIGHT)
    groups = rollout.packed(20)
    assert sorted(torch.cat(groups).tolist()) == list(range(8))
    assert len(groups) > 2
    for group in groups:
        part = rollout.rows(group)
        assert part.entering.shape[1] == (part.prompt_lengths + part.mask.sum(1)).max()
        assert part.entering.shape[0] == 1 or part.entering.shape[:2].numel() <= 20


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
    rollout, responses, _ = rollout_of(found, [0, 1, 2] * 10)
    assert {response.finished for response in responses} == {True, False}
    expected = [response.proxy if response.finished else -1.0 for response in responses]
    assert rollout.returns[:, 0].tolist() == pytest.approx(expected, abs=1e-5, rel=1e-4)


GROUPS = {"prompts_per_update": 8, "responses_per_prompt": 8}


def sure(found):
    """Scale the unembedding, which does not train: at its initial scale no policy could be sure of a token."""
    with torch.no_grad():
        found.top.unembed.weight.mul_(8)
    return found


def ending(found, prompt):
    """How likely a response ends at once."""
    with torch.no_grad():
        logits = found.language.network(torch.tensor([prompt])).logits[0, -1]
    return logits.softmax(0)[found.language.tokenizer.eos_token_id].item()


def one_for_all(scores):
    return torch.ones(len(scores.single))


@pytest.mark.parametrize(
    "estimator",
    [
        {"estimator": "gae"},
        {"estimator": "reinforce++"},
        {"estimator": "rloo", **GROUPS},
        {"estimator": "grpo", **GROUPS},
    ],
    ids=lambda settings: settings["estimator"],
)
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2, 3, 4))])
def test_every_estimator_reaches_the_optimum_of_a_one_token_reward(model, ppo, rewards, estimator, seed):
    model = model.model_copy(update={"response_tokens": 1})
    settings = {"updates": 100, "prompts_per_update": 64, "minibatch_size": 64, "kl_weight": 0.0, "learning_rate": 0.01}
    ppo = ppo.model_copy(update=settings | estimator)
    found = sure(learner(model, ppo, rewards, seed))
    assert ending(found, PROMPTS[0]) < 0.1
    assert any(row["finished"] > 0.95 for row, _ in train(found, Prompts(PROMPTS), one_for_all))
    assert all(ending(found, prompt) > 0.85 for prompt in PROMPTS)


@pytest.mark.parametrize("kl", [{"kl_in": "reward", "kl_estimator": "k1"}, {"kl_in": "loss", "kl_estimator": "k2"}])
def test_with_a_kl_term_the_policy_ends_at_the_optimum_in_between(model, ppo, rewards, kl):
    """The optimum is pi_ref * exp(r / beta) / Z, with reward 1 for ending at once and -1 for all else."""
    model = model.model_copy(update={"response_tokens": 1})
    settings = {"updates": 50, "minibatch_size": 64, "epochs": 1, "kl_weight": 0.4, "learning_rate": 0.01}
    ppo = ppo.model_copy(update=settings | GROUPS | kl | {"estimator": "rloo"})
    found = sure(learner(model, ppo, rewards))
    start = ending(found, PROMPTS[1])
    good, bad = start * math.exp(1 / 0.4), (1 - start) * math.exp(-1 / 0.4)
    list(train(found, Prompts(PROMPTS[1:2]), one_for_all))
    assert start < 0.05
    assert ending(found, PROMPTS[1]) == pytest.approx(good / (good + bad), abs=0.15)


def test_the_responses_to_a_prompt_stand_together(model, ppo, rewards):
    ppo = ppo.model_copy(update={"prompts_per_update": 3, "responses_per_prompt": 4, "estimator": "grpo"})
    arm = typed_arm(reward="robust", nominal_weight=0.4, credible=2.0, seed=1)
    _, rows, kept = trained(model, ppo, rewards, arm_reward(arm, Accelerator(cpu=True)))
    assert rows[0]["optimizer_steps"] == ppo.epochs * 12 / ppo.minibatch_size
    asked = [row.prompt for row in kept if row.update == 0]
    assert asked == [prompt for prompt in asked[::4] for _ in range(4)]
    assert sorted(asked[::4]) == [0, 1, 2]
    assert len({row.response for row in kept}) > 3


def test_rloo_compares_each_score_with_the_prompts_other_responses(model, ppo, rewards):
    ppo = ppo.model_copy(update={"estimator": "rloo", "responses_per_prompt": 2, "kl_weight": 0.0})
    rollout, responses, _ = rollout_of(learner(model, ppo, rewards), [0, 0, 1, 1])
    score = torch.tensor([response.proxy if response.finished else -1.0 for response in responses])
    difference = score[0::2] - score[1::2]
    expected = torch.stack([difference, -difference], dim=1).flatten()[:, None] * rollout.mask
    torch.testing.assert_close(rollout.advantages, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("estimator", ["rloo", "grpo", "reinforce++"])
def test_without_a_critic_no_value_is_learnt_or_told(model, ppo, rewards, estimator):
    ppo = ppo.model_copy(update={"estimator": estimator, "responses_per_prompt": 2, "updates": 2})
    found, rows, _ = trained(model, ppo, rewards, single)
    assert not any(weight.any() or weight.requires_grad for weight in found.top.value.parameters())
    assert not {"value_loss", "explained_variance"} & set(rows[-1])
    assert all(math.isfinite(value) for row in rows for value in row.values())


def test_the_kl_loss_is_the_mean_over_tokens_of_its_estimate(model, ppo, rewards):
    ppo = ppo.model_copy(update={"kl_in": "loss", "kl_estimator": "k3", "epochs": 1, "minibatch_size": 8})
    found = learner(model, ppo, rewards)
    with torch.no_grad():
        found.top.norm.weight.add_(0.3)
    rollout, _, metrics = rollout_of(found, EIGHT)
    terms = [
        math.exp(old - new) - 1 + new - old
        for new, old, kept in zip(
            rollout.logprobs.flatten().tolist(),
            rollout.reference_logprobs.flatten().tolist(),
            rollout.mask.flatten().tolist(),
            strict=True,
        )
        if kept
    ]
    step = optimise(found, rollout)
    assert step["kl_loss"] == pytest.approx(sum(terms) / len(terms), abs=1e-6)
    assert metrics["kl_k3"] == pytest.approx(sum(terms) / 8, abs=1e-5)
    assert step["kl_loss"] > 1e-4


def test_a_kl_term_in_the_loss_leaves_the_rewards_alone(model, ppo, rewards):
    def advantages(**kl):
        settings = ppo.model_copy(update={"estimator": "reinforce++", **kl})
        found = learner(model, settings, rewards)
        with torch.no_grad():
            found.top.norm.weight.add_(0.3)
        return rollout_of(found)[0].advantages

    free = advantages(kl_weight=0.0)
    torch.testing.assert_close(advantages(kl_in="loss", kl_estimator="k2", kl_weight=0.5), free, atol=1e-6, rtol=0)
    assert not torch.allclose(advantages(kl_in="reward", kl_estimator="k2", kl_weight=0.5), free)


def test_the_kl_weight_moves_with_each_update_where_there_is_a_target(model, ppo, rewards):
    ppo = ppo.model_copy(update={"kl_target": 0.01, "learning_rate": 0.02})
    found, rows, _ = trained(model, ppo, rewards, single)
    weights = [*(row["kl_weight"] for row in rows), found.kl_weight]
    for row, before, after in zip(rows, weights, weights[1:], strict=False):
        expected = adapted_weight(before, row["kl"], target=0.01, responses=8, horizon=80)
        assert after == pytest.approx(expected, rel=1e-6)
    assert weights[0] == 0.05 != weights[-1]


def test_training_ends_with_the_first_rollout_beyond_the_kl_budget(model, ppo, rewards):
    far = ppo.model_copy(update={"updates": 8, "learning_rate": 0.02, "kl_weight": 0.0})
    free, budget = trained(model, far, rewards, single)[1], 0.2
    ends = next(n for n, row in enumerate(free) if row["kl"] > budget)
    _, rows, kept = trained(model, far.model_copy(update={"max_kl": budget}), rewards, single)
    assert [row["kl"] for row in rows] == [row["kl"] for row in free[: ends + 1]]
    assert [row["kl_budget_exceeded"] for row in rows] == [*[0.0] * ends, 1.0]
    assert 0 < ends < 7
    assert "optimizer_steps" not in rows[-1]
    assert {row.update for row in kept} == set(range(ends + 1))
