"""A card follows from the manifest, says what a reader must know, and lets no text out of its place."""

import json
import re
from importlib import import_module
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from rrlhf.pipeline.artifacts import CARD, HISTORY, content_digest
from rrlhf.pipeline.cards import about, card, code, what, without_front_matter
from rrlhf.pipeline.graph import nodes
from rrlhf.pipeline.keys import key_digest
from rrlhf.pipeline.params import load_params
from rrlhf.pipeline.stages import STAGES, spec_of, unit
from rrlhf.pipeline.store import Store
from rrlhf.types import Dataset

ROOT = Path(__file__).parents[2]
GLOSSARY = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
MEMBERS = {"ensemble.kind": "members", "arms.direct": {"method": "dpo", "seed": 1}}
CHOOSY = {"method": "best_of_n", "reward": "worst", "credible": 0.0, "n": 4, "seed": 1}
PARAMS = load_params(
    ROOT,
    "default",
    MEMBERS | {"arms.choosy": CHOOSY, "prepare.limit": 448},
)
DATA = Dataset("default", Path("data/default"), "md5:d41d8cd98f00b204e9800998ecf8427e.dir")
MODELS = {node.name: node for node in nodes(PARAMS) if spec_of(node.stage).model}
ROWS = [
    {"step": 1, "kl": 0.5, "proxy": 0.1, "seconds": 1.0},
    {"step": 2, "kl": 12.34567, "health_hacking_suspected": 1, "seconds": 2.0},
]


def manifest(name, **changes):
    node = MODELS[name]
    inputs = {argument: DATA.digest if argument == "data" else argument[0] * 64 for argument in node.inputs}
    document = {"stage": node.stage, "params": node.settings, "inputs": inputs, "code": {}, "numerics": {"torch": "2"}}
    made = {"name": name, "key": "1" * 64, "digest": "2" * 64, "document": document, "git_commit": "3" * 40}
    made |= {"seconds": 61.5, "hardware": {"cores": 2}, "dataset": about(DATA, PARAMS.prepare)}
    return made | changes


def sections(text):
    """The text under every heading of the second level, code left out."""
    return dict(part.split("\n", 1) for part in re.sub(r"```.*?```", "", text, flags=re.DOTALL).split("\n## ")[1:])


@pytest.mark.parametrize("name", MODELS)
def test_every_model_has_a_card_that_the_hub_can_read(name):
    stage, read = MODELS[name].stage, ModelCard(card(manifest(name), ROWS), ignore_metadata_errors=False).data
    assert read.library_name == ("transformers" if spec_of(stage).makes == "language model" else "rrlhf")
    assert read.datasets == ["default"]
    assert f"rrlhf-{stage.replace('_', '-')}" in read.tags
    assert "license" not in read.to_dict()


@pytest.mark.parametrize("name", MODELS)
def test_a_card_names_data_parents_settings_numbers_and_how_to_make_it_again(name):
    made = manifest(name)
    text = card(made, ROWS)
    told = sections(text)
    assert "\n\n\n" not in text
    assert list(told) == ["How to load", "Data", "Made from", "Metrics", "Limits", "Reproduce", "Settings"]
    assert (
        f"`default` in DVC's version `{DATA.digest}`, "
        "made from `tasks of rrlhf/data/tasks.py` (at most 448 rows of it)." in told["Data"]
    )
    assert ("through its parents" in told["Data"]) == ("data" not in MODELS[name].inputs)
    for argument, digest in made["document"]["inputs"].items():
        assert argument == "data" or f"| `{argument}` | `{digest}` |" in told["Made from"]
    assert f"| `kl` | 12.35 | {unit(MODELS[name].stage, 'kl')} |" in told["Metrics"]
    assert "`seconds`" not in told["Metrics"]
    assert "not for production" in told["Limits"]
    assert "rrlhf reproduce 111111111111\n" in text
    assert (
        yaml.safe_load(re.search(r"## Settings\n\n```yaml\n(.*)\n```\n", text, re.DOTALL)[1]) == MODELS[name].settings
    )


def test_a_card_tells_what_was_cut():
    rows = [{"step": 0, "cut_prompts": 0.0, "cut_responses": 0.0312, "cut_pairs": 0.5}, *ROWS]
    text = card(manifest("sft"), rows)
    assert "same when cut: 3.1 % of responses, 50.0 % of pairs.\n\n## Made from" in text
    assert "\n\n\n" not in text
    assert "when cut" not in card(manifest("sft"), ROWS)


def test_a_policy_tells_its_health_and_what_gold_and_proxy_are():
    told = sections(card(manifest("ppo-robust"), ROWS))
    assert "Health of the training: hacking_suspected (step 2)." in told["Metrics"]
    assert "Health of the training: healthy." in card(manifest("ppo-robust"), ROWS[:1])
    assert "no detector watched it" in card(manifest("dpo-direct"), ROWS)
    assert "reward hacking" in told["Limits"]
    assert "Gold is the score of an independent judge" in told["Limits"]


def test_the_reward_is_named_with_its_settings_and_functions():
    robust = "The SFT model after PPO on the reward `robust, nominal_weight 0.4, credible 8"
    assert what(manifest("ppo-robust")) == f"{robust}`."
    made = manifest("ppo-robust")
    made["document"]["params"]["arm"]["functions"] = {"rules:short": -0.5}
    assert what(made) == f"{robust}, -0.5 rules:short`."
    assert "sample 4 responses" in what(manifest("best_of_n-choosy"))


def test_hub_models_and_data_sets_are_named_as_the_hub_does():
    made = manifest("reward")
    made["document"]["params"]["model"] |= {"base": "owner/model", "revision": "abc"}
    prepare = PARAMS.prepare.model_copy(update={"source": "owner/pairs", "revision": "def", "limit": None})
    made["dataset"] = about(DATA, prepare)
    text = card(made, ROWS)
    read = ModelCard(text).data
    assert (read.base_model, read.datasets) == ("owner/model", ["owner/pairs"])
    assert f"`default` in DVC's version `{DATA.digest}`, made from `owner/pairs@def`." in text


@pytest.mark.parametrize("name", MODELS)
def test_what_a_card_tells_to_import_is_there(name):
    found = re.findall(r"^from (rrlhf\S*) import (\w+)$", card(manifest(name), ROWS), re.MULTILINE)
    assert found or spec_of(MODELS[name].stage).makes == "language model"
    assert all(hasattr(import_module(module), wanted) for module, wanted in found)


def test_a_card_tells_which_rows_of_the_source_were_left_out(tmp_path):
    (tmp_path / "summary.json").write_text(json.dumps({"rows": 9, "rejected": {"score_tie": 3, "empty": 1}}))
    prepare = PARAMS.prepare.model_copy(
        update={"source": "owner/pairs", "revision": "def", "config": "en", "split": "x"}
    )
    made = manifest("reward") | {"dataset": about(DATA._replace(path=tmp_path), prepare)}
    text = " ".join(card(made, ROWS).split())
    assert "from `owner/pairs@def, config en, split x` (at most 448 rows of it). Bad rows" in text
    assert "Bad rows were left out: 3 score_tie, 1 empty. " in text


def test_a_card_does_not_tell_where_a_machine_keeps_its_files():
    prepare = PARAMS.prepare.model_copy(update={"source": "/home/someone/rows.jsonl"})
    assert about(DATA, prepare)["source"] == "rows.jsonl"


def test_text_of_others_stays_in_its_place():
    nasty = "a`b|c\n\n# d ```` e"
    made = manifest("sft")
    made["document"]["params"]["model"] |= {"system_prompt": nasty, "base": nasty}
    text = card(made, [{"step": 1, nasty: 1.0}])
    assert code(nasty) == "`a'b/c # d '''' e`"
    assert re.findall("^# .*", re.sub("(`{3,}).*?\n\\1", "", text, flags=re.DOTALL), re.MULTILINE) == ["# SFT model"]
    assert yaml.safe_load(re.search(r"\n`{5}yaml\n(.*)\n`{5}\n", text, re.DOTALL)[1])["model"]["base"] == nasty


def test_a_model_without_rows_data_or_commit_has_a_card():
    made = manifest("sft", git_commit=None)
    del made["dataset"]
    assert "None were logged." in card(made, [])
    assert f"A data set in DVC's version `{DATA.digest}`." in card(made, [])
    assert card(manifest("sft") | {"document": {"stage": "evaluate", "params": {}, "inputs": {}}}, ROWS) is None


def test_the_same_manifest_has_the_same_card():
    assert card(manifest("ppo-robust"), ROWS) == card(manifest("ppo-robust"), ROWS)
    assert without_front_matter(card(manifest("sft"), ROWS)).startswith("# SFT model\n")


@pytest.mark.parametrize("stage", [stage for stage, spec in STAGES.items() if spec.model])
def test_units_are_those_of_the_glossary(stage):
    heading = "reward, ensemble and its members" if STAGES[stage].makes == "reward model" else stage
    rows = re.findall(
        r"^\| (`[^|]+)\| ([^|]+) \|", GLOSSARY.split(f"\n## {heading}\n")[1].split("\n## ")[0], re.MULTILINE
    )
    units = {name: written for names, written in rows for name in re.findall("`([^`]+)`", names)}
    assert {name: unit(stage, name) for name in units} == units
    assert {name for names in STAGES[stage].units.values() for name in names} <= set(units)


def test_the_units_of_one_head_function_reading_or_detector_are_those_of_all():
    assert unit("ppo", "head_3") == unit("ppo", "score") == "normalised score"
    assert unit("ppo", "head_3_nominal") == unit("ensemble", "heldout_accuracy_worst") == "share, 0 to 1"
    assert unit("ensemble", "heldout_accuracy_worst_stderr") == unit("reward", "heldout_accuracy_stderr") == "share"
    assert unit("ppo", "function_short") == "of the function"


@pytest.fixture
def publish(tmp_path):
    store, paper = Store(tmp_path), manifest("sft")["document"]

    def call(seconds):
        staged = store.staging("sft", key_digest(paper))
        staged.mkdir(parents=True)
        (staged / "model.safetensors").write_bytes(b"weights")
        (staged / HISTORY).write_text('{"step": 1, "loss": 2.0}\n')
        return store.publish("sft", paper, staged, seconds=seconds, dataset=about(DATA, PARAMS.prepare))

    return store, call


def test_a_published_model_has_its_card_which_is_checked_but_no_content(publish):
    store, call = publish
    made = call(1.0)
    assert "| `loss` | 2 | nats per token |" in (made.path / CARD).read_text()
    assert set(made.manifest["files"]) == {CARD, HISTORY, "model.safetensors"}
    assert made.digest == content_digest({"model.safetensors": made.manifest["files"]["model.safetensors"]})
    (made.path / CARD).write_text("Perfect.")
    assert CARD in store.fault(made)


def test_equal_content_has_one_digest_however_its_card_reads(publish, tmp_path):
    _, call = publish
    first = call(1.0)
    first.path.rename(tmp_path / "away")
    second = call(2.0)
    assert second.digest == first.digest
    assert second.manifest["files"][CARD] != first.manifest["files"][CARD]
