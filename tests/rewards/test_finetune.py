"""Training a trunk with its heads: exactness of its short cuts, and adapters beside one trunk."""

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from rrlhf.config import TrunkTraining
from rrlhf.data.tables import preferences
from rrlhf.models.adapters import adapted, diversity
from rrlhf.pipeline.params import load_params
from rrlhf.rewards import finetune as module
from rrlhf.rewards.features import pair_features
from rrlhf.rewards.finetune import finetune, trainable
from rrlhf.rewards.heads import RewardHeads, bootstrap_weights
from rrlhf.rewards.objectives import single_loss
from rrlhf.rewards.trunk import start_trunk
from rrlhf.robust import Scores

ROOT = Path(__file__).parents[2]


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


def test_layers_that_train_are_given_states_in_full_precision(start, settings):
    model = load_params(ROOT, "tiny", {"model.dtype": "bfloat16"}).model
    trunk, given = start_trunk(settings, model, start / "sft"), []
    responses = module.PairedResponses(trunk, preferences(start / "data", "preferences")[:4], settings)

    def seen(states, *lengths):
        given.append(states.dtype)
        return Scores(torch.zeros(8, 1), torch.ones(8, 1))

    responses.scores(seen, [0, 1, 2, 3])
    assert given == [torch.float32]


def test_lora_is_merged_into_plain_weights_of_low_rank_change(start, settings):
    lora = settings.model_copy(update={"trunk": "lora", "lora_rank": 2})
    untouched = start_trunk(settings, load_params(ROOT, "tiny").model, start / "sft")
    trunk, *_ = tuned(start, lora)
    change = weight(trunk) - weight(untouched)
    assert 1 <= torch.linalg.matrix_rank(change, atol=1e-6) <= 2
    assert not any("lora" in name for name in trunk.language.network.state_dict())
    assert not any(parameter.requires_grad for parameter in trunk.language.network.parameters())


@pytest.fixture
def three(start, settings):
    """A trunk with three adapters of rank 2 in its upper layer, and the matrices A of each adapted map."""
    torch.manual_seed(0)
    trunk = start_trunk(settings, load_params(ROOT, "tiny").model, start / "sft")
    trunk = trunk._replace(language=adapted(trunk.language, range(1, 2), 2, copies=3))
    attention = trunk.language.network.model.layers[1].self_attn
    return trunk, [attention.q_proj.lora_A, attention.v_proj.lora_A]


def test_each_adapter_gives_the_features_of_a_trunk_with_its_change_in_the_weights(three, start, settings):
    trunk, _ = three
    pairs = preferences(start / "data", "heldout")[:5]
    before = pair_features(trunk, pairs, pairs, 4, "").train.chosen
    plain = pair_features(start_trunk(settings, trunk.model, start / "sft"), pairs, pairs, 4, "").train.chosen
    torch.testing.assert_close(before, plain[:, None].expand(-1, 3, -1))  # they start as the frozen maps
    for name, weight in trunk.language.network.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight)
    together = pair_features(trunk, pairs, pairs, 4, "").train.chosen
    for k in range(3):
        alone = start_trunk(settings, trunk.model, start / "sft")
        for name in ("q_proj", "v_proj"):
            ours, plain = (getattr(t.language.network.model.layers[1].self_attn, name) for t in (trunk, alone))
            down, up = (list(side.values())[k].weight for side in (ours.lora_A, ours.lora_B))
            with torch.no_grad():
                plain.weight += up @ down
        expected = pair_features(alone, pairs, pairs, 4, "").train.chosen
        torch.testing.assert_close(together[:, k], expected, atol=1e-5, rtol=1e-5)


def test_every_adapter_learns_from_its_own_features(three):
    trunk, _ = three
    states = torch.randn(2, 5, 32)
    pooled = trunk.upper(states, 1, torch.tensor([2, 2]), torch.tensor([3, 1]))
    for k in range(3):
        trunk.language.network.zero_grad()
        pooled[:, k].sum().backward(retain_graph=True)
        ups = [list(layer.lora_B.values()) for layer in trunk.language.network.modules() if hasattr(layer, "lora_B")]
        assert all(bool(each.weight.grad.any()) == (j == k) for beside in ups for j, each in enumerate(beside))


def test_diversity_lies_between_parallel_and_orthogonal_adapters(three):
    trunk, maps = three
    with torch.no_grad():
        for beside in maps:
            for k, down in enumerate(beside.values()):
                down.weight.copy_(torch.eye(6, 32)[2 * k : 2 * k + 2] * 5)
    assert diversity(trunk.language).item() == pytest.approx(6, abs=1e-4)
    with torch.no_grad():
        for beside in maps:
            for down in beside.values():
                down.weight.fill_(1.0)
    assert diversity(trunk.language).item() == pytest.approx(6**0.5, abs=1e-4)


def test_pushing_diversity_up_turns_adapters_apart(three):
    trunk, maps = three
    before = diversity(trunk.language).item()
    optimizer = torch.optim.SGD([down.weight for beside in maps for down in beside.values()], lr=0.05)
    for _ in range(20):
        (-diversity(trunk.language)).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert before < diversity(trunk.language).item() <= 6
