"""Reward models that people have: their scores are transformers' own, alone, as trunks, and several as an ensemble."""

import json
import re
from pathlib import Path

import pytest
import torch
import transformers
from classifiers import CHATML, GPT, LLAMA, MAKES, QWEN, saved, tokenizer
from conftest import prompts
from reward_models import Made

from rrlhf.data.tables import preferences, write_tables
from rrlhf.memo import Memo
from rrlhf.pipeline.check import check_models
from rrlhf.pipeline.graph import nodes
from rrlhf.pipeline.keys import key_digest, key_document
from rrlhf.pipeline.params import ParamsError, load_params
from rrlhf.rewards.features import PairFeatures

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {name: saved(tmp_path_factory.mktemp("brought"), name) for name in MAKES}


@pytest.fixture
def texts(start):
    return prompts(start / "data", "ppo")[:4], ["aei ou", "", "What is </s> or <|im_end|>?", "Kids, love it!"]


@torch.no_grad()
def logits(folder, asked, said, together):
    """What transformers says of conversations, padded on the right where they run together."""
    network = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    own = transformers.AutoTokenizer.from_pretrained(folder)
    rows = [
        own.apply_chat_template(
            [*prompt, {"role": "assistant", "content": text}], return_dict=False, sanitize_control_tokens=True
        )
        for prompt, text in zip(asked, said, strict=True)
    ]
    if not together:
        return torch.cat([network(torch.tensor([row])).logits[:, 0] for row in rows])
    padding, longest = network.config.pad_token_id, max(map(len, rows))
    grid = torch.tensor([row + [padding] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    return network(grid, attention_mask=mask).logits[:, 0]


def made_under(start, root, **overrides):
    """Make the reward models under these settings, whose texts are long enough for every template."""
    few = {"reward.epochs": 2, "ensemble.epochs": 2, "model.prompt_tokens": 90, "model.response_tokens": 30}
    return Made(start, root, few | {name.replace("__", "."): value for name, value in overrides.items()})


def raw(model, asked, said):
    """Scores before normalisation."""
    return model.heads(model.features(asked, said, 3)).mean


@pytest.mark.parametrize("name", MAKES)
def test_its_scores_are_transformers_own(name, folders, start, texts, tmp_path):
    made = made_under(start, tmp_path, reward__base=folders[name], reward__head="own")
    model = made.model("reward")
    found = raw(model, *texts)[:, 0]
    torch.testing.assert_close(found, logits(folders[name], *texts, together=False), atol=1e-5, rtol=1e-5)
    if MAKES[name][3]:
        torch.testing.assert_close(found, logits(folders[name], *texts, together=True), atol=1e-5, rtol=1e-5)
    heldout = preferences(start / "data", "heldout")
    said = [[pair.prompt for pair in heldout] * 2, [p.chosen for p in heldout] + [p.rejected for p in heldout]]
    scores = model.score(*said)
    assert scores.mean.mean().item() == pytest.approx(0, abs=1e-4)
    assert scores.mean.std().item() == pytest.approx(1, abs=1e-4)
    assert (scores.std > 0).all()


@pytest.fixture(scope="module")
def several(start, folders, tmp_path_factory):
    """Two of them as they are, of other widths and tokenizers, beside two heads that are trained on the SFT model."""
    models = [{"base": folders[QWEN]}, {"base": folders[GPT], "prompt_tokens": 80, "response_tokens": 40}]
    root = tmp_path_factory.mktemp("several")
    given = {"ensemble__kind": "given", "ensemble__models": models, "ensemble__heads": 2}
    return made_under(start, root, **given)


def test_several_make_an_ensemble_beside_trained_heads(several, folders, texts):
    ensemble, asked, said = several.model("ensemble"), *texts
    found = raw(ensemble, asked, said)
    assert found.shape == (4, 4)
    for head, name in enumerate((QWEN, GPT)):
        torch.testing.assert_close(
            found[:, head], logits(folders[name], asked, said, together=False), atol=1e-5, rtol=1e-5
        )
    scores = ensemble.score(asked, said)
    for number in range(2):
        alone = several.model(f"member-{number}").score(asked, said)
        torch.testing.assert_close(scores.mean[:, 2 + number], alone.mean[:, 0], atol=1e-4, rtol=1e-4)
    assert ensemble.trunks[2] is ensemble.trunks[3]
    reference = PairFeatures.load(several.root / "ensemble").reference
    torch.testing.assert_close(ensemble.heads.score(reference).mean.mean(0), torch.zeros(4), atol=1e-4, rtol=0)


@pytest.mark.parametrize("trained", [{}, {"reward__trunk": "full", "reward__train_layers": 1}])
@pytest.mark.parametrize("name", [LLAMA, GPT])
def test_heads_are_trained_on_one_as_a_trunk(name, trained, folders, start, texts, tmp_path):
    learns = {"reward__epochs": 10, "reward__trunk_epochs": 3, "reward__trunk_learning_rate": 1e-3}
    made = made_under(start, tmp_path, reward__base=folders[name], **learns, **trained)
    losses = [[row[kind] for row in made.rows["reward"] if kind in row] for kind in ("loss", "trunk_loss")]
    assert all(each[-1] < each[0] for each in losses if each)
    assert bool(losses[1]) == bool(trained)
    ensemble, reward = made.model("ensemble"), made.model("reward")
    assert ensemble.trunks[0].identity == reward.trunks[0].identity
    together, alone = (ensemble.score(*texts, batch_size=size).mean for size in (3, 1))
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "kind",
    [
        {"ensemble__kind": "lora", "ensemble__heads": 2},
        {"ensemble__kind": "warm", "ensemble__heads": 2, "reward__trunk": "lora"},
        pytest.param({"ensemble__kind": "warm", "ensemble__heads": 2, "reward__trunk": "full"}, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize(
    "name", [LLAMA, *(pytest.param(name, marks=pytest.mark.slow) for name in MAKES if name != LLAMA)]
)
def test_adapters_and_averaged_members_train_on_one_as_a_trunk(name, kind, folders, start, texts, tmp_path):
    learns = {"reward__train_layers": 1, "reward__trunk_epochs": 6, "reward__trunk_learning_rate": 1e-4}
    plain = {"reward__trunk_pairs_per_batch": 40, "ensemble__loss": "bradley_terry"}  # a loss without noise
    made = made_under(start, tmp_path, reward__base=folders[name], **learns, **plain, **kind)
    losses = [[row["trunk_loss"] for row in rows if "trunk_loss" in row] for rows in made.rows.values()]
    assert all(each[-1] < each[0] for each in losses if each)
    assert sum(map(bool, losses)) == (1 if kind["ensemble__kind"] == "lora" else 3)  # the single head and two members
    ensemble = made.model("ensemble")
    heldout = preferences(start / "data", "heldout")
    stored = PairFeatures.load(tmp_path / "ensemble").heldout.chosen
    by_text = ensemble.score([pair.prompt for pair in heldout], [pair.chosen for pair in heldout])
    torch.testing.assert_close(by_text.mean, ensemble.heads.score(stored).mean, atol=1e-4, rtol=1e-4)


def test_a_pair_that_one_of_them_cannot_tell_apart_is_left_out_for_all(folders, start, tmp_path):
    rows = [
        {"prompt": [{"role": "user", "content": f"Say {n}."}], "chosen": f"a{n} {'b' * 3 * n}", "rejected": f"x {n}"}
        for n in range(10)
    ]
    rows[4] |= {"chosen": "the same beginning, a good end", "rejected": "the same beginning, a bad end"}
    (tmp_path / "data").mkdir()
    for name in ("preferences", "heldout"):
        write_tables(tmp_path / "data", ((name, each) for each in [row | {"flipped": None} for row in rows]))
    (tmp_path / "sft").symlink_to(start / "sft")
    models = [{"base": folders[QWEN]}, {"base": folders[LLAMA], "response_tokens": 19}]
    given = {"ensemble__kind": "given", "ensemble__models": models, "ensemble__heads": 0}
    made = made_under(tmp_path, tmp_path, **given)
    alone = [PairFeatures.load(tmp_path / f"given-{number}").train.chosen for number in range(2)]
    together = PairFeatures.load(tmp_path / "ensemble").train.chosen
    assert (len(alone[0]), len(alone[1]), together.shape) == (10, 9, (9, 2, 32))
    kept = [n for n in range(10) if n != 4]
    torch.testing.assert_close(together[:, 0, :16], alone[0][kept])
    torch.testing.assert_close(together[:, 1], alone[1])
    assert made.rows["given-1"][0]["cut_pairs"] == 0.1


def test_each_is_known_by_its_content_and_one_more_changes_no_other(folders, tmp_path):
    def keys(*bases, **changed):
        given = {"ensemble.kind": "given", "ensemble.heads": 2, "ensemble.models": [{"base": base} for base in bases]}
        found = nodes(load_params(ROOT, "tiny", given | {name.replace("__", "."): v for name, v in changed.items()}))
        return {node.name: key_digest(key_document(node, {})) for node in found}

    two, three = keys(folders[QWEN], folders[GPT]), keys(folders[QWEN], folders[GPT], folders[LLAMA])
    assert set(three) - set(two) == {"given-2"}
    assert {name for name in two if two[name] != three[name]} == {"ensemble"}
    other = keys(folders[QWEN], folders[GPT], reward__epochs=3, sft__epochs=2)
    assert {name for name in two if two[name] != other[name]} == {"sft", "reward"}


@pytest.fixture
def look(tmp_path):
    """Check the tiny profile with some changes; return mistakes."""

    def check(**changed):
        params = load_params(ROOT, "tiny", {name.replace("__", "."): value for name, value in changed.items()})
        return check_models(params, tmp_path, Memo(tmp_path / "memo.json"), fetch=False)[0]

    return check


def test_what_is_wrong_with_them_is_told_at_once_before_anything_runs(look, folders, model, tmp_path):
    from safetensors.torch import load_file, save_file

    for name in ("two labels", "no score", "bert", "code"):
        (tmp_path / name).mkdir()
    saved(tmp_path / "two labels", QWEN, labels=2)
    saved(tmp_path / "no score", LLAMA)
    weights = load_file(tmp_path / "no score" / "model.safetensors")
    save_file({k: w for k, w in weights.items() if k != "score.weight"}, tmp_path / "no score" / "model.safetensors")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    bert = transformers.AutoModelForSequenceClassification.from_config(transformers.BertConfig(**sizes, num_labels=1))
    bert.save_pretrained(tmp_path / "bert")
    tokenizer(CHATML).save_pretrained(tmp_path / "bert")
    brings_code = {
        "architectures": ["OwnRewardModel"],
        "model_type": "own",
        "auto_map": {"AutoConfig": "own.OwnConfig"},
    }
    (tmp_path / "code" / "config.json").write_text(json.dumps(brings_code))
    bases = [tmp_path / "two labels", tmp_path / "no score", tmp_path / "bert", folders[GPT], folders[LLAMA]]
    models = [{"base": str(base)} for base in [*bases, "random:2x32", tmp_path / "code"]]
    models[3] |= {"prompt_tokens": 120, "response_tokens": 20}
    told = look(ensemble__kind="given", ensemble__models=models, model__system_prompt="Rhyme.", reward__head="own",
                reward__base="random:2x32", evaluate__judge={"base": "random:2x32"})  # fmt: skip
    for number, expected in (
        (0, "it gives 2 scores (num_labels in config.json), a reward model gives one"),
        (1, "weights score.weight are not in its file, so they would be drawn at random"),
        (2, "BertForSequenceClassification does not"),
        (3, "it was made for 128 tokens (max_position_embeddings), and prompt and response take 140"),
        (4, "its chat template refuses a system turn (no system role); set model.system_prompt to null"),
        (5, "a language model, and no reward model that scores by itself"),
        (6, "it needs code that comes with it to be run, and rrlhf runs none"),
    ):
        [mistake] = [line for line in told if line.startswith(f"ensemble.models.{number}.base ")]
        assert expected in mistake
    assert told[-2].startswith("evaluate.judge.base random:2x32: a language model, and no reward model")
    assert told[-1].startswith("reward.base random:2x32: a language model, and no reward model")
    assert len(told) == 9
    [mistake, _] = look(model__base=folders[LLAMA])
    assert mistake.startswith("model.base ")
    assert mistake.endswith("weights lm_head.weight are not in its file, so they would be drawn at random")


def test_one_that_takes_no_system_turn_is_told_of_before_anything_runs(folders, tmp_path):
    params = load_params(ROOT, "tiny", {"reward.base": folders[LLAMA]})
    mistakes, [note] = check_models(params, tmp_path, Memo(tmp_path / "memo.json"), fetch=False)
    assert mistakes == []
    assert note.startswith(f"reward.base {folders[LLAMA]}: its chat template takes no system turn (no system role)")


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"reward.head": "own"}, "reward.head: own is that of a reward model of yours: name it in reward.base"),
        (
            {"reward.head": "own", "reward.base": "x", "reward.trunk": "full"},
            "takes a reward model as it is: set frozen",
        ),
        ({"ensemble.models": [{"base": "x"}]}, "ensemble.models: they belong to kind given, not to heads"),
        ({"ensemble.kind": "given"}, "ensemble.models: list should have at least 1 item"),
        ({"ensemble.kind": "given", "ensemble.models": [{"base": "x", "sigma": 1}]}, "models.0.sigma: unknown setting"),
        (
            {"ensemble.kind": "given", "ensemble.models": [{"base": "x"}], "ensemble.sigma": "learned"},
            "ensemble.sigma: reward models as they are have learned none",
        ),
        (
            {"ensemble.kind": "given", "ensemble.models": [{"base": "x"}], "ensemble.hidden": 4},
            "ensemble.hidden: beside reward models as they are stand linear heads",
        ),
    ],
)
def test_settings_that_do_not_fit_them_are_refused(changed, told):
    with pytest.raises(ParamsError, match=re.escape(told)):
        load_params(ROOT, "tiny", changed)
