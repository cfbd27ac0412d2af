"""Details that decide whether PPO works, each with a test that fails when it is broken (docs/ppo.md lists them)."""

import pytest
import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM

from rrlhf.models.load import load_base, load_model, save_model
from rrlhf.policy.learner import prepare_learner
from rrlhf.policy.reward import Prompts, load_reward_models
from rrlhf.stages.ppo import collect, optimise, train

PROMPTS = Prompts([[3, 9, 12], [4, 7, 8, 20, 21], [5, 30, 31, 32]])
EIGHT = [0, 1, 2, 0, 1, 2, 0, 1]  # rows of them


def learner(language, model, ppo, rewards):
    torch.manual_seed(0)
    models = load_reward_models(*rewards, torch.device("cpu"))
    return prepare_learner(Accelerator(cpu=True), language, models, model=model, ppo=ppo, seed=0)


def single(scores):
    return scores.single


def trainable(found):
    return {name: weight for name, weight in found.top.named_parameters() if weight.requires_grad}


def test_dropout_stays_off_where_the_model_has_some(model, ppo, rewards, tmp_path):
    save_model(load_base(model), tmp_path / "model")
    network = AutoModelForCausalLM.from_pretrained(tmp_path / "model", attention_dropout=0.5)
    network.config.attention_dropout = 0.5
    network.save_pretrained(tmp_path / "model")
    found = learner(load_model(tmp_path / "model", model), model, ppo, rewards)
    assert found.language.network.model.layers[2].self_attn.attention_dropout == 0.5
    for _ in range(2):  # an update leaves it off
        rollout, *_ = collect(found, PROMPTS, EIGHT, single)
        logprobs, _ = found.policy(rollout.entering, rollout.prompt_lengths, rollout.responses, rollout.mask)
        torch.testing.assert_close(logprobs * rollout.mask, rollout.logprobs, atol=1e-4, rtol=0)
        optimise(found, rollout)


def test_an_optimizer_step_is_adam_with_epsilon_1e_5_and_without_weight_decay(model, ppo, rewards):
    ppo = ppo.model_copy(update={"epochs": 1, "minibatch_size": 8, "max_grad_norm": 1e9})
    found, gradients = learner(load_base(model), model, ppo, rewards), {}

    def note(*_):
        gradients.update({name: weight.grad.double().clone() for name, weight in trainable(found).items()})

    found.optimizer.optimizer.register_step_post_hook(note)
    before = {name: weight.detach().double().clone() for name, weight in trainable(found).items()}
    rollout, *_ = collect(found, PROMPTS, EIGHT, single)
    optimise(found, rollout)
    for name, weight in trainable(found).items():
        gradient = gradients[name]  # at the first step both moments, corrected for their start, are the gradient's own
        expected = before[name] - ppo.learning_rate * gradient / (gradient.abs() + 1e-5)
        torch.testing.assert_close(weight.double(), expected, atol=1e-7, rtol=1e-5)


def test_gradients_are_clipped_to_their_norm_in_the_step(model, ppo, rewards):
    ppo = ppo.model_copy(update={"max_grad_norm": 0.01})
    found, norms = learner(load_base(model), model, ppo, rewards), []

    def note(*_):
        norms.append(torch.stack([weight.grad.norm() for weight in trainable(found).values()]).norm().item())

    found.optimizer.optimizer.register_step_post_hook(note)
    rollout, *_ = collect(found, PROMPTS, EIGHT, single)
    assert optimise(found, rollout)["gradient_norm"] > 0.01  # what is logged is the norm before it
    assert norms == pytest.approx([0.01] * len(norms), rel=1e-3)


def test_the_learning_rate_falls_linearly_to_zero(model, ppo, rewards):
    ppo = ppo.model_copy(update={"updates": 4})
    rows = train(learner(load_base(model), model, ppo, rewards), PROMPTS, single)
    shares = [row["learning_rate"] / ppo.learning_rate for row, _ in rows]
    assert shares == pytest.approx([1.0, 0.75, 0.5, 0.25])


@pytest.mark.parametrize("trains", ["layers", "lora", "full"])
def test_logits_exist_only_where_a_response_token_counts(model, ppo, rewards, trains):
    ppo = ppo.model_copy(update={"trains": trains, "epochs": 1, "minibatch_size": 8})
    found, rows = learner(load_base(model), model, ppo, rewards), []
    rollout, *_ = collect(found, PROMPTS, EIGHT, single)
    found.top.unembed.register_forward_pre_hook(lambda _, states: rows.append(states[0].shape[:-1].numel()))
    optimise(found, rollout)
    assert rows == [int(rollout.mask.sum())]


def test_the_value_function_starts_at_zero_and_reads_prompt_and_response(model, ppo, rewards):
    found = learner(load_base(model), model, ppo, rewards)
    rollout, *_ = collect(found, PROMPTS, EIGHT, single)
    assert not rollout.values.any()
    with torch.no_grad():
        found.top.value.weight.fill_(1.0)
    place = (rollout.prompt_lengths, rollout.responses, rollout.mask)
    _, values = found.policy(rollout.entering, *place)
    changed = rollout.entering.clone()
    changed[:, 0] += 1.0  # the first token of every prompt
    _, others = found.policy(changed, *place)
    assert ((others - values).abs() > 1e-6)[rollout.mask].all()


@pytest.mark.parametrize("trains", ["layers", "lora", "full"])
def test_in_bfloat16_the_first_minibatch_still_has_ratio_one_and_what_trains_is_float32(model, ppo, rewards, trains):
    model = model.model_copy(update={"dtype": "bfloat16"})
    ppo = ppo.model_copy(update={"trains": trains, "epochs": 1, "minibatch_size": 8})
    found = learner(load_base(model), model, ppo, rewards)
    rollout, *_ = collect(found, PROMPTS, EIGHT, single)
    step = optimise(found, rollout)
    assert step["ratio"] == pytest.approx(1.0, abs=0.02)
    assert step["skipped_steps"] == 0
    assert {weight.dtype for weight in found.top.parameters() if weight.requires_grad} == {torch.float32}


def test_prompts_come_once_each_before_any_comes_again(model, ppo, rewards):
    ppo = ppo.model_copy(update={"prompts_per_update": 6, "minibatch_size": 6, "updates": 4})
    rows = train(learner(load_base(model), model, ppo, rewards), PROMPTS, single)
    asked = [response.prompt for _, responses in rows for response in responses]
    assert all(sorted(asked[i : i + 3]) == [0, 1, 2] for i in range(0, len(asked), 3))
