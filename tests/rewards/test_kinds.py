"""Every kind of reward model and ensemble, from its settings to scores of text."""

import json
from pathlib import Path

import pytest
import torch
from conftest import prompts
from reward_models import Made
from safetensors.torch import load_file

from rrlhf.pipeline.graph import nodes
from rrlhf.pipeline.keys import key_digest, key_document
from rrlhf.pipeline.params import load_params
from rrlhf.rewards.features import PairFeatures, folder_of

ROOT = Path(__file__).parents[2]
TRAINS = {
    "reward.layer": 2,
    "reward.train_layers": 1,
    "reward.trunk_learning_rate": 1.0e-3,
    "reward.trunk_epochs": 2,
    "ensemble.epochs": 60,
    "ensemble.heads": 2,
}
KINDS = {
    "full": {"reward.trunk": "full"},
    "lora trunk": {"reward.trunk": "lora"},
    "joint": {"reward.trunk": "full", "ensemble.freeze_backbone": False},
    "members": {"ensemble.kind": "members"},
    "trained members": {"ensemble.kind": "members", "reward.trunk": "full"},
    "warm": {"ensemble.kind": "warm", "reward.trunk": "full"},
    "warm heads": {"ensemble.kind": "warm"},
    "lora": {"ensemble.kind": "lora", "ensemble.diversity": 0.01},
}


@pytest.fixture(scope="module")
def made(start, tmp_path_factory):
    done = {}

    def make(kind):
        if kind not in done:
            done[kind] = Made(start, tmp_path_factory.mktemp("kind"), TRAINS | KINDS[kind])
        return done[kind]

    return make


@pytest.fixture
def texts(start):
    return prompts(start / "data", "ppo")[:5], ["aei ou", "", "xyz", "a" * 30, "Kids, love it!"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_scores_text_the_same_in_any_batch(made, texts, kind):
    found = made(kind)
    heads = 1 if kind.startswith("warm") else 2
    for name, width in (("reward", 1), ("ensemble", heads)):
        expected = found.model(name).score(*texts)
        assert expected.mean.shape == expected.std.shape == (5, width)
        asked, said = ([*side[::-1]] for side in texts)
        for one, other in zip(found.model(name).score(asked, said, batch_size=2), expected, strict=True):
            torch.testing.assert_close(one.flip(0), other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_stored_features_are_those_of_the_stored_trunk(made, kind):
    """What the heads were judged on is what a user of the artifact gets from the text."""
    from rrlhf.data.tables import preferences

    found = made(kind)
    pairs = preferences(found.start / "data", "heldout")
    expected = found.model("ensemble")
    features = PairFeatures.load(folder_of(found.root / "ensemble", found.root / "reward"))
    by_feature = expected.heads.score(features.heldout.chosen)
    by_text = expected.score([pair.prompt for pair in pairs], [pair.chosen for pair in pairs])
    for one, other in zip(by_text, by_feature, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_learns_the_preferences(made, kind):
    rows = made(kind).rows["ensemble"]
    assert rows[-1]["heldout_accuracy_mean"] > 0.8


@pytest.mark.parametrize("kind", ["full", "lora trunk", "joint", "lora"])
def test_training_the_trunk_lowers_the_loss_and_changes_its_trained_layers_only(made, kind):
    found = made(kind)
    node = "reward" if kind in {"full", "lora trunk"} else "ensemble"
    losses = [row["trunk_loss"] for row in found.rows[node] if "trunk_loss" in row]
    assert losses[-1] < losses[0]
    before = load_file(found.start / "sft" / "model.safetensors")
    after = load_file(found.root / node / "trunk" / "model.safetensors")
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert all(name.startswith("model.layers.1.") for name in changed)
    assert bool(changed) == (kind != "lora")  # the adapters lie beside the trunk


def test_members_are_the_reward_models_that_they_were_made_of(made, texts):
    for kind in ("members", "trained members"):
        found = made(kind)
        together = found.model("ensemble").score(*texts)
        alone = [found.model(f"member-{number}").score(*texts) for number in range(2)]
        torch.testing.assert_close(together.mean, torch.cat([one.mean for one in alone], dim=1), atol=1e-4, rtol=1e-4)
        assert torch.corrcoef(together.mean.T).fill_diagonal_(0).max() < 0.99999


def test_averaged_heads_give_the_average_of_the_raw_rewards(made):
    found = made("warm heads")
    features = PairFeatures.load(folder_of(found.root / "ensemble", found.root / "reward")).heldout.chosen
    members = [found.model(f"member-{n}").heads for n in range(2)]
    mean = torch.stack([heads(features).mean for heads in members]).mean(0)
    averaged = found.model("ensemble").heads
    torch.testing.assert_close(averaged(features).mean, mean, atol=1e-5, rtol=1e-5)


def test_averaged_trunks_have_the_mean_of_all_weights(made):
    found = made("warm")
    name = "model.layers.1.mlp.up_proj.weight"
    members = [load_file(found.root / f"member-{n}" / "trunk" / "model.safetensors")[name] for n in range(2)]
    assert not torch.equal(members[0], members[1])
    averaged = load_file(found.root / "ensemble" / "trunk" / "model.safetensors")[name]
    torch.testing.assert_close(averaged, torch.stack(members).mean(0))


def test_one_more_member_trains_one_and_averaging_trains_none():
    def keys(**overrides):
        settings = TRAINS | {"reward.trunk": "full"} | {k.replace("__", "."): v for k, v in overrides.items()}
        found = nodes(load_params(ROOT, "tiny", settings))
        return {node.name: key_digest(key_document(node, {})) for node in found if node.stage == "member"}

    four, five = keys(ensemble__kind="members", ensemble__heads=4), keys(ensemble__kind="members", ensemble__heads=5)
    assert len(set(five.values())) == 5
    assert {name: five[name] for name in four} == four
    assert keys(ensemble__kind="warm", ensemble__heads=5) == five
    assert keys(ensemble__kind="heads") == {}


def test_the_default_kind_has_the_nodes_that_it_always_had():
    found = {node.name: set(node.inputs) for node in nodes(load_params(ROOT, "tiny"))}
    assert found["ensemble"] == {"reward"}


# tests/stages/test_whole.py has a policy that reads adapters
@pytest.mark.parametrize("kind", ["trained members", pytest.param("lora", marks=pytest.mark.slow)])
def test_a_policy_is_trained_and_compared_with_it(made, kind):
    found = made(kind)
    for node in nodes(found.params):
        if node.arm or node.stage == "evaluate":
            found.run(node)
    result = json.loads((found.root / "evaluate" / "evaluation.json").read_text())
    assert [policy["name"] for policy in result["policies"]] == ["sft", *found.params.arms]
    assert all(len(point["heads"]) == 2 for point in result["curves"])
