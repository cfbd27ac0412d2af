"""Training a trunk with its heads: exactness of its short cuts, and adapters against LoRA as the library has it."""

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from rrlhf.config import TrunkTraining
from rrlhf.data.tables import preferences
from rrlhf.models.adapters import Adapted, adapt, adapters, diversity
from rrlhf.pipeline.params import load_params
from rrlhf.rewards import finetune as module
from rrlhf.rewards.features import pair_features
from rrlhf.rewards.finetune import finetune, trainable
from rrlhf.rewards.heads import RewardHeads, bootstrap_weights
from rrlhf.rewards.objectives import single_loss
from rrlhf.rewards.trunk import start_trunk

ROOT = Path(__file__).parents[1]


@pytest.fixture
def settings():
    reward = load_params(ROOT, "tiny", {"reward.layer": 2, "reward.train_layers": 1, "reward.trunk": "full"}).reward
    return TrunkTraining.model_validate(reward.model_dump(include=set(TrunkTraining.model_fields)))


def tuned(start, settings, heads=1):
    """Train a trunk from the SFT model with fresh heads for a few steps; return it with them."""
    params = load_params(ROOT, "tiny")
    trunk = start_trunk(settings, params.model, start / "sft")
    pairs = preferences(start / "data", "preferences")[:20]
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = RewardHeads(32, heads, 0, 0.05)
    model.standardise(pair_features(trunk, pairs, pairs, 64, "").train.chosen)
    weights = bootstrap_weights(len(pairs), heads, generator)
    with trainable(trunk, settings):
        rows = finetune(
            trunk,
            model,
            single_loss(params.reward),
            pairs,
            weights,
            settings.model_copy(update={"trunk_pairs_per_batch": 10, "trunk_learning_rate": 1e-3}),
            engine=Accelerator(cpu=True),
            generator=generator,
        )
        rows = list(rows)
    return trunk, model, rows


def weight(trunk):
    return trunk.language.network.model.layers[1].self_attn.q_proj.weight


def test_accumulated_gradients_train_the_same_trunk(start, settings):
    whole, heads, rows = tuned(start, settings.model_copy(update={"batch_size": 64}), heads=2)
    parts, part_heads, part_rows = tuned(start, settings.model_copy(update={"batch_size": 6}), heads=2)
    torch.testing.assert_close(weight(parts), weight(whole), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(part_heads.outer, heads.outer, atol=1e-5, rtol=1e-4)
    assert [row["trunk_loss"] for row in part_rows] == pytest.approx([row["trunk_loss"] for row in rows], abs=1e-5)


def test_states_that_do_not_fit_in_memory_are_computed_anew(start, settings, monkeypatch):
    kept, *_ = tuned(start, settings)
    monkeypatch.setattr(module, "CACHED_SHARE", 0)
    anew, *_ = tuned(start, settings)
    torch.testing.assert_close(weight(anew), weight(kept), atol=1e-6, rtol=1e-5)


def test_lora_is_merged_into_plain_weights_of_low_rank_change(start, settings):
    lora = settings.model_copy(update={"trunk": "lora", "lora_rank": 2})
    untouched = start_trunk(settings, load_params(ROOT, "tiny").model, start / "sft")
    trunk, *_ = tuned(start, lora)
    change = weight(trunk) - weight(untouched)
    assert 1 <= torch.linalg.matrix_rank(change, atol=1e-6) <= 2
    assert not any("lora" in name for name in trunk.language.network.state_dict())
    assert not any(parameter.requires_grad for parameter in trunk.language.network.parameters())


def test_one_adapter_is_lora_as_the_library_has_it():
    from peft import LoraConfig, LoraModel

    plain = torch.nn.Sequential(torch.nn.Linear(6, 4, bias=False))
    ours = Adapted(torch.nn.Linear(6, 4, bias=False), copies=1, rank=3)
    ours.base.load_state_dict(plain[0].state_dict())
    theirs = LoraModel(plain, LoraConfig(r=3, lora_alpha=3, target_modules=["0"]), "default")
    torch.nn.init.normal_(ours.up)
    with torch.no_grad():
        theirs.model[0].lora_A["default"].weight.copy_(ours.down[0])
        theirs.model[0].lora_B["default"].weight.copy_(ours.up[0])
    x = torch.randn(5, 7, 6)
    torch.testing.assert_close(ours(x), theirs.model(x))


def test_adapters_in_one_batch_equal_adapters_one_by_one():
    together = Adapted(torch.nn.Linear(6, 4), copies=3, rank=2)
    torch.nn.init.normal_(together.up)
    x = torch.randn(5, 7, 6)
    found = together(x.repeat(3, 1, 1)).unflatten(0, (3, 5))
    for k in range(3):
        change = together.up[k] @ together.down[k]
        torch.testing.assert_close(found[k], together.base(x) + x @ change.T, atol=1e-5, rtol=1e-5)


def test_diversity_lies_between_parallel_and_orthogonal_adapters(start, settings):
    network = start_trunk(settings, load_params(ROOT, "tiny").model, start / "sft").language.network
    adapt(network, 1, 2, 3, 2)
    with torch.no_grad():
        for each in adapters(network):
            each.down.copy_(torch.eye(6, 32).reshape(3, 2, 32) * 5)
    assert diversity(network).item() == pytest.approx(6, abs=1e-4)
    with torch.no_grad():
        for each in adapters(network):
            each.down.copy_(torch.ones(3, 2, 32))
    assert diversity(network).item() == pytest.approx(6**0.5, abs=1e-4)


def test_pushing_diversity_up_turns_adapters_apart(start, settings):
    network = start_trunk(settings, load_params(ROOT, "tiny").model, start / "sft").language.network
    torch.manual_seed(0)
    adapt(network, 1, 2, 3, 2)
    before = diversity(network).item()
    optimizer = torch.optim.SGD([each.down for each in adapters(network)], lr=0.05)
    for _ in range(20):
        (-diversity(network)).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert before < diversity(network).item() <= 6
