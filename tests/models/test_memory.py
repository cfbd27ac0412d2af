"""What a stage is planned to take of memory is what its tensors take."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from accelerate import Accelerator
from conftest import ROOT, TINY

from rrlhf.located import ParamsError
from rrlhf.models.load import load_base
from rrlhf.models.memory import Allocated, Rows
from rrlhf.models.processes import autocast, trained_weights
from rrlhf.models.top import split_responses
from rrlhf.pipeline.memory import moments
from rrlhf.pipeline.params import load_params
from rrlhf.policy.learner import prepare_learner, top_layers
from rrlhf.policy.reward import load_reward_models

SPREAD = {"launch__processes": 2, "launch__sharding": "full"}


def planned(stage, **settings):
    changed = {name.replace("__", "."): value for name, value in settings.items()}
    return moments(stage, load_params(ROOT, "tiny", changed))


@pytest.mark.parametrize(("trains", "dtype"), [("layers", "float32"), ("lora", "bfloat16"), ("full", "float32")])
def test_weights_gradients_and_optimizer_are_those_of_the_real_tensors(model, ppo, rewards, trains, dtype):
    model, ppo = model.model_copy(update={"dtype": dtype}), ppo.model_copy(update={"trains": trains})
    engine = Accelerator(cpu=True)
    rewards = load_reward_models(*rewards, engine.device)
    learner = prepare_learner(engine, load_base(model), rewards, model=model, ppo=ppo, seed=0)
    sum(weight.sum() for weight in learner.top.parameters() if weight.requires_grad).backward()
    gradients = [weight.grad for weight in learner.top.parameters() if weight.grad is not None]
    learner.optimizer.step()
    held = {id(each): each for part in (learner.language.network, learner.top) for each in part.parameters()}
    states = [each for state in learner.optimizer.state.values() for name, each in state.items() if name != "step"]

    size = {"model__base": model.base, "ppo__train_layers": ppo.train_layers, "ppo__lora_rank": ppo.lora_rank}
    last = planned("ppo", ppo__trains=trains, model__dtype=dtype, **size)[-1]
    assert last.weights == sum(each.nbytes for each in held.values())
    assert last.gradients == sum(each.nbytes for each in gradients)
    assert last.optimizer == sum(each.nbytes for each in states)


def test_keys_and_values_are_counted_for_every_row_and_token():
    before, sampling, *_ = planned("ppo", model__prompt_tokens=20, model__response_tokens=5)
    layers, key_heads, width, rows = 2, 2, 8, 8
    assert sampling.rollout - before.rollout == 2 * layers * key_heads * width * rows * (20 + 5) * 4


def test_what_is_allocated_counts_once_and_no_longer_than_it_is_there():
    before = torch.zeros(10)
    with Allocated([before]) as allocated:
        one = torch.zeros(1000)
        view = one[:10] + before.view(2, 5).flatten()
        assert allocated.now == 4000 + 40
        del one
        torch.zeros(500)
        assert (allocated.now, allocated.peak) == (40, 4040)
    assert len(view) == len(Rows(3, 2, 1).tokens[0]) + 7


@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_a_model_that_runs_whole_is_planned(stage, tmp_path):
    transformers.GPT2Config(n_embd=32, n_layer=3, n_head=4, n_positions=128, vocab_size=128).save_pretrained(tmp_path)
    assert all(moment.total > 0 for moment in planned(stage, model__base=str(tmp_path)))


def test_a_model_with_experts_is_not_planned_and_that_is_told(tmp_path):
    transformers.MixtralConfig(**TINY, num_local_experts=4, vocab_size=128).save_pretrained(tmp_path)
    with pytest.raises(ParamsError, match="experts"):
        planned("sft", model__base=str(tmp_path))


def test_the_trunk_of_a_reward_model_is_planned_with_what_trains_of_it():
    frozen, trained = planned("reward", reward__trunk="lora", reward__train_layers=1)
    assert trained.gradients == 4 * 8 * (32 + 32 + 32 + 16) + 4 * (32 * 2 + 2)  # A and B of q and v, and the head
    assert frozen.weights == trained.weights


@pytest.mark.slow
def test_a_plan_tells_what_would_make_the_most_of_it_less(project, typed, monkeypatch):
    monkeypatch.chdir(project)
    code, out, _ = typed("plan", "--profile", "tiny", "--memory", "--json")
    told = json.loads(out)
    assert code == 0
    assert {"sft", "reward", "ppo-single", "ppo-robust", "dpo-direct", "evaluate"} == set(told["nodes"])
    most = max(node["peak"] for node in told["nodes"].values())
    assert told["cheaper"]
    assert all(0 < peak < most for peak in told["cheaper"].values())


@pytest.mark.parametrize("trains", ["layers", "lora", "full"])
def test_of_processes_that_share_the_weights_each_is_planned_with_its_share(trains):
    alone, shared = (planned("ppo", ppo__trains=trains, **launch)[-1] for launch in ({}, SPREAD))
    assert shared.optimizer == alone.optimizer // 2
    assert alone.weights / 2 < shared.weights
    assert alone.gradients / 2 < shared.gradients


def test_layers_that_run_again_leave_no_copies_of_their_weights_behind(model):
    model = model.model_copy(update={"base": "random:4x64", "dtype": "bfloat16", "gradient_checkpointing": True})
    language = load_base(model)
    top = top_layers(language, torch.device("cpu"), None)
    trained_weights(top)
    place = split_responses([[5, 6, 7]], [2], torch.device("cpu"))
    with Allocated(top.parameters()) as allocated, autocast(model):
        top(torch.tensor([[5, 6, 7]]), *place)
    assert allocated.peak < 2 * sum(weight.numel() for weight in top.layers.parameters())


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", ["sft, all layers", "ppo, lora, checkpointing", "ppo, full, 24k words", "ppo, layers, spread"]
)
def test_a_plan_says_what_a_stage_takes(case, monkeypatch):
    monkeypatch.syspath_prepend(Path(ROOT))
    from benchmarks.memory import measure

    [found] = measure([case])
    assert found.planned == pytest.approx(found.measured, rel=0.15)
