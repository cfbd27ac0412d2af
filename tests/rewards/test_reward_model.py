"""Reward models that read text: invariance, storage, and a trunk with another tokenizer than the policy's."""

import json
from pathlib import Path

import pytest
import torch
from conftest import prompts
from tokenizers import Tokenizer

from rrlhf.models.load import LanguageModel, load_base, save_model
from rrlhf.models.rollout import Draws, Samples, response_features, sample, text_lengths
from rrlhf.pipeline.params import load_params
from rrlhf.rewards.scoring import RewardModel, load_reward_model
from rrlhf.stages import ensemble, evaluate, ppo, reward

ROOT = Path(__file__).parents[2]
TEMPLATE = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}</s>{% endfor %}[reply]"


def foreign(folder, base="random:3x48"):
    """Save a random model whose tokens have other numbers than usual, and whose chat template is another."""
    model = load_params(ROOT, "tiny").model.model_copy(update={"base": base})
    language = load_base(model)
    described = json.loads(language.tokenizer.backend_tokenizer.to_str())
    vocabulary = described["model"]["vocab"]
    special = [token["content"] for token in described["added_tokens"]]
    plain = sorted((token for token in vocabulary if token not in special), reverse=True)
    described["model"]["vocab"] = {token: i for i, token in enumerate([*special, *plain])}
    tokenizer = type(language.tokenizer)(
        tokenizer_object=Tokenizer.from_str(json.dumps(described)),
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template=TEMPLATE,
    )
    save_model(LanguageModel(language.network, tokenizer), folder)
    return str(folder)


class Made:
    """A reward model, an ensemble on it and what came before, from the tiny profile with overrides."""

    def __init__(self, start, root, **overrides):
        self.start, self.root = start, root
        self.params = load_params(ROOT, "tiny", {name.replace("__", "."): v for name, v in overrides.items()})
        common = {"model": self.params.model, "seed": 1, "log": lambda row: None}
        for name in ("reward", "ensemble"):
            (root / name).mkdir()
        before = {"data": start / "data", "sft": start / "sft"}
        reward.run(**common, reward=self.params.reward, **before, out=root / "reward")
        ensemble.run(**common, ensemble=self.params.ensemble, reward=root / "reward", out=root / "ensemble")

    def run(self, name, stage, **arguments):
        folder, rows = self.root / name, []
        folder.mkdir()
        inputs = {"data": self.start / "data", "sft": self.start / "sft"}
        inputs |= {"reward": self.root / "reward", "ensemble": self.root / "ensemble"}
        stage.run(model=self.params.model, **inputs, **arguments, out=folder, log=rows.append)
        return folder, rows


@pytest.fixture(scope="module")
def shared(start, tmp_path_factory):
    return Made(start, tmp_path_factory.mktemp("shared"))


@pytest.fixture(scope="module")
def own(start, tmp_path_factory):
    root = tmp_path_factory.mktemp("own")
    return Made(start, root, reward__base=foreign(root / "base"), reward__layer=2)


@pytest.fixture
def texts(start):
    asked = prompts(start / "data", "ppo")[:11]
    return asked, [["", "Kids love it.", "x" * 40, "A  b"][i % 4] + str(i) * (i % 3) for i in range(11)]


@pytest.mark.parametrize("name", ["reward", "ensemble"])
@pytest.mark.parametrize("batch_size", [1, 2, 3, 7])
def test_neither_batch_size_nor_order_nor_padding_matters(own, texts, name, batch_size):
    model = load_reward_model(own.root / name, None)
    asked, responses = texts
    expected = model.score(asked, responses, batch_size=11)
    order = torch.randperm(11, generator=torch.Generator().manual_seed(batch_size)).tolist()
    found = model.score([asked[i] for i in order], [responses[i] for i in order], batch_size=batch_size)
    assert found.mean.shape == found.std.shape == (11, 1 if name == "reward" else 3)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other[order], atol=1e-5 * (1 + float(other.abs().max())), rtol=0)


def test_a_reward_model_with_its_own_trunk_needs_nothing_but_its_folder(own, start, texts, tmp_path):
    expected = load_reward_model(own.root / "ensemble", None).score(*texts)
    moved = (own.root / "ensemble").rename(tmp_path / "moved")
    try:
        found = load_reward_model(moved, None).score(*texts)
    finally:
        moved.rename(own.root / "ensemble")
    assert torch.equal(found.mean, expected.mean)
    assert found.mean.shape == (11, 3)


def test_only_the_layers_in_use_are_stored(own):
    described = json.loads((own.root / "reward" / "trunk" / "config.json").read_text())
    assert described["num_hidden_layers"] == 2
    assert described["tie_word_embeddings"]


def test_the_reward_models_of_one_trunk_share_its_identity(own, shared):
    single, several = (load_reward_model(own.root / name, None) for name in ("reward", "ensemble"))
    assert single.trunks[0].identity == several.trunks[0].identity is not None
    assert load_reward_model(shared.root / "reward", shared.start / "sft").trunks[0].identity is None


def test_without_a_trunk_of_its_own_it_asks_for_the_folder(shared):
    with pytest.raises(ValueError, match="give the folder of the SFT model"):
        load_reward_model(shared.root / "reward", None)


def test_the_policys_pass_and_the_text_give_the_same_scores(shared, texts):
    """Reward models that share the policy's layers read its states; from the text they say the same."""
    model: RewardModel = load_reward_model(shared.root / "ensemble", shared.start / "sft")
    trunk, (asked, _) = model.trunks[0], texts
    tokens = [trunk.encode(prompt, "").tokens for prompt in asked]
    drawn: Samples = sample(trunk.language, tokens, 12, Draws(torch.Generator().manual_seed(0)), keep=(trunk.layer,))
    pooled = response_features(drawn.states[trunk.layer], drawn.prompt_lengths, text_lengths(drawn))
    responses = [trunk.language.tokenizer.decode(row).removesuffix("</s>") for row in drawn.lists()]
    again = [trunk.encode(*pair).tokens for pair in zip(asked, responses, strict=True)]
    same = [i for i in range(len(asked)) if again[i] == tokens[i] + _text(drawn, i)]  # not all bytes are text
    assert same
    found, expected = model.score(asked, responses).mean[same], model.heads.score(pooled).mean[same]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def _text(drawn, i):
    row = drawn.lists()[i]
    return row[:-1] if drawn.finished[i] else row


def test_policies_are_trained_and_compared_with_a_foreign_reward_model(own):
    """The reward models' tokens, template and width are others than the policy's: only text passes between them."""
    policies, found = {}, {}
    for name in ("single", "robust"):
        arm = own.params.arms[name]
        policies[name], found[name] = own.run(name, ppo, ppo=own.params.ppo, health=own.params.health, arm=arm)
    comparison = {"seed": 1, "gold": own.params.gold, "evaluate": own.params.evaluate, "policies": policies}
    folder, _ = own.run("evaluate", evaluate, **comparison)
    result = json.loads((folder / "evaluation.json").read_text())
    assert [policy["name"] for policy in result["policies"]] == ["sft", "single", "robust"]
    assert len(found["robust"]) == own.params.ppo.updates
    shown = result["samples"][0]
    said = shown["responses"]["robust"]
    again = load_reward_model(own.root / "ensemble", None).score(
        prompts(own.start / "data", "evaluate")[:1], [said["text"]]
    )
    assert said["heads"] == pytest.approx(again.mean[0].tolist(), abs=1e-4)
