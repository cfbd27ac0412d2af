"""Direct preference optimisation on a tiny random model, in one process and in two."""

import json
import math
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from rrlhf.config import Launch, typed_arm
from rrlhf.data.tables import preferences
from rrlhf.models.load import load_base, load_model
from rrlhf.models.text import Texts
from rrlhf.pipeline.launch import execute
from rrlhf.pipeline.params import load_params
from rrlhf.policy.learner import top_layers, with_optimizer
from rrlhf.policy.reward import read_arm
from rrlhf.stages import dpo as stage

ROOT = Path(__file__).parents[2]
ARM = typed_arm(method="dpo", seed=1)
PAIRS = 40  # of the fixture `start`


@pytest.fixture(scope="module")
def model():
    params = load_params(ROOT, "tiny", {"model.base": "random:3x32"})
    return params.model


@pytest.fixture(scope="module")
def settings():
    chosen = {"epochs": 2, "pairs_per_batch": 12, "microbatch_size": 5, "train_layers": 2, "learning_rate": 3.0e-3}
    return load_params(ROOT, "tiny", {f"dpo.{name}": value for name, value in chosen.items()}).dpo


def run(start, model, settings, out, arm=ARM):
    out.mkdir()
    rows = []
    stage.run(model=model, dpo=settings, arm=arm, data=start / "data", sft=start / "sft", out=out, log=rows.append)
    return rows, load_file(out / "model.safetensors")


@pytest.fixture(scope="module")
def trained(start, model, settings, tmp_path_factory):
    return run(start, model, settings, tmp_path_factory.mktemp("dpo") / "out")


def prepared(start, model, settings):
    """The policy before its first step."""
    language, engine = load_model(start / "sft", model), Accelerator(cpu=True)
    top = top_layers(language, engine.device, settings.train_layers)
    return with_optimizer(engine, language, top, settings.learning_rate, 8)


def encoded(start, trained, model):
    return stage.encoded(Texts(trained.language, model), preferences(start / "data", "preferences"))


def test_the_policy_learns_to_tell_pairs_apart_and_what_it_learns_holds_for_others(trained):
    (said, *rows), _ = trained
    assert said["step"] == 0
    assert [row["step"] for row in rows] == list(range(1, 2 * math.ceil(PAIRS / 12) + 1))
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)  # the policy is the reference
    assert rows[0]["margin"] == pytest.approx(0, abs=1e-5)
    assert rows[-1]["loss"] < 0.6
    assert rows[-1]["margin"] == pytest.approx(rows[-1]["chosen_reward"] - rows[-1]["rejected_reward"], abs=1e-5)
    held = [row for row in rows if "heldout_loss" in row]
    assert [row["step"] for row in held] == [4, 8]  # at the end of each epoch
    assert held[-1]["heldout_accuracy"] > 0.9  # vowels are preferred
    assert rows[0]["learning_rate"] == 3e-3
    assert 0 < rows[-1]["learning_rate"] < 1e-3


def test_only_the_top_layers_train_and_the_folder_is_a_policy(trained, start, tmp_path):
    before, after = load_file(start / "sft" / "model.safetensors"), trained[1]
    changed = {name for name, tensor in after.items() if not torch.equal(before[name], tensor)}
    assert changed
    assert all(name.startswith(("model.layers.1.", "model.layers.2.", "model.norm")) for name in changed)


def test_the_same_seed_gives_the_same_bits_and_another_seed_another_policy(trained, start, model, settings, tmp_path):
    _, again = run(start, model, settings, tmp_path / "again")
    _, other = run(start, model, settings, tmp_path / "other", typed_arm(method="dpo", seed=2))
    assert all(torch.equal(trained[1][name], tensor) for name, tensor in again.items())
    assert not all(torch.equal(trained[1][name], tensor) for name, tensor in other.items())
    assert read_arm(tmp_path / "again")[0] == ARM


@pytest.mark.parametrize("change", [{"microbatch_size": 100}, {"microbatch_size": 1}, {"keep_states": False}])
def test_parts_and_kept_states_change_nothing_but_rounding(trained, start, model, settings, tmp_path, change):
    _, weights = run(start, model, settings.model_copy(update=change), tmp_path / "out")
    for name, tensor in trained[1].items():
        torch.testing.assert_close(weights[name], tensor, atol=2e-4, rtol=1e-3)


def test_log_probabilities_are_those_of_the_whole_network_without_padding(start, model, settings):
    policy = prepared(start, model, settings)
    answers = encoded(start, policy, model)
    pairs = stage.prepare_pairs(policy, answers, model, settings)
    for pair in (0, 7):
        for side in (0, 1):
            tokens, prompt = answers[pair][side]
            with torch.no_grad():
                logprobs = policy.language.network(torch.tensor([tokens])).logits[0].log_softmax(-1)
            slow = sum(logprobs[i - 1, tokens[i]].item() for i in range(prompt, len(tokens)))
            assert pairs.reference[pair, side].item() == pytest.approx(slow, abs=1e-4)


def test_a_response_of_several_pairs_is_read_once(start, model, settings):
    policy = prepared(start, model, settings)
    (a, b), (c, d), *_ = answers = encoded(start, policy, model)
    alone, shared = (
        stage.prepare_pairs(policy, pairs, model, settings) for pairs in (answers, [(a, b), (b, a), (c, d)])
    )
    torch.testing.assert_close(shared.reference[0], alone.reference[0], atol=1e-4, rtol=0)
    assert shared.reference[1].tolist() == shared.reference[0].tolist()[::-1]
    assert len(shared.answers) == 4


def test_a_response_ends_where_the_policy_would_end_it(model):
    language = load_base(model)
    pair = (preferences_of("short", "x" * 50),)
    [(short, cut)] = stage.encoded(Texts(language, model), pair)
    assert short.tokens[short.prompt_length :][-1] == language.end
    assert len(short.tokens) - short.prompt_length == 6
    assert len(cut.tokens) - cut.prompt_length == model.response_tokens
    assert language.end not in cut.tokens[cut.prompt_length :]  # cut off, as a sample of that length is


def preferences_of(chosen, rejected):
    from rrlhf.types import Preference

    return Preference([{"role": "user", "content": "Say"}], chosen, rejected)


def test_the_gradient_is_the_published_one(start, model, settings):
    """grad = -beta * sigmoid(-margin) * (grad log pi(chosen) - grad log pi(rejected)), eq. 7 of the paper."""
    policy = prepared(start, model, settings)
    pairs = stage.prepare_pairs(policy, encoded(start, policy, model), model, settings)
    weight = policy.top.layers[-1].mlp.up_proj.weight
    shifted = pairs.reference[:3] + torch.tensor([[0.7, -0.4]])
    log_ratio = pairs.logprobs(policy.policy, [0, 1, 2]) - shifted
    stage._losses(log_ratio, settings).mean().backward()
    found, weight.grad = weight.grad.clone(), None
    wrong = torch.sigmoid(-settings.beta * (log_ratio[:, 0] - log_ratio[:, 1])).detach()
    logprobs = pairs.logprobs(policy.policy, [0, 1, 2])
    (-settings.beta * wrong * (logprobs[:, 0] - logprobs[:, 1])).mean().backward()
    torch.testing.assert_close(found, weight.grad, atol=1e-7, rtol=1e-4)


def test_ipo_settles_where_its_margin_is(start, model, settings, tmp_path):
    ipo = settings.model_copy(update={"loss": "ipo", "beta": 0.5, "epochs": 6})
    rows, _ = run(start, model, ipo, tmp_path / "ipo")
    assert rows[1]["loss"] == pytest.approx(1.0, abs=1e-4)  # (0 - 1 / (2 * .5))^2
    assert rows[-1]["loss"] < 0.2
    assert rows[-1]["margin"] == pytest.approx(0.5, abs=0.2)  # beta * 1 / (2 beta)


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["none", "full"])
def test_two_processes_train_the_same_policy(trained, start, model, settings, tmp_path, sharding):
    params = {"model": model.model_dump(), "dpo": settings.model_dump(), "arm": ARM.model_dump()}
    out, inputs = tmp_path / "out", {name: start / name for name in ("data", "sft")}
    two = Launch(processes=2, threads=1, arms_at_once=1, runner="threads", sharding=sharding)
    execute({"stage": "dpo", "params": params}, inputs=inputs, out=out, launch=two)
    rows = [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]
    losses = [[row for row in each if "loss" in row] for each in (rows, trained[0])]
    for row, alone in zip(*losses, strict=True):
        assert row["loss"] == pytest.approx(alone["loss"], abs=2e-3)
        assert row.get("heldout_margin", 0) == pytest.approx(alone.get("heldout_margin", 0), abs=2e-2)
    for name, tensor in load_file(out / "model.safetensors").items():
        torch.testing.assert_close(tensor, trained[1][name], atol=1e-3, rtol=1e-2)
