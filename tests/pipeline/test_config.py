"""Settings: every mistake at once, with its place and the way out."""

import json
import re
import shlex
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from rrlhf.config import REWARDS, typed_arm
from rrlhf.located import ParamsError
from rrlhf.pipeline.params import LONGEST_NAME, load_params, option, parse_override, profiles, run_name
from rrlhf.tools.sweeps.grid import parse_grid

ROOT = Path(__file__).parents[2]
JUDGE = {"address": "https://a/v1", "name": "x"}
CHOOSY = {"method": "best_of_n", "reward": "single", "n": 4, "seed": 1}


def mistakes(root, profile="default", **overrides):
    with pytest.raises(ParamsError) as error:
        load_params(root, profile, {name.replace("__", "."): value for name, value in overrides.items()})
    return str(error.value).splitlines()


def rewrite(root, name, line, file="params.yaml"):
    """Put another line in place of the first that sets `name`, and return its number."""
    lines = (root / file).read_text().splitlines()
    number = next(i for i, text in enumerate(lines) if text.strip().startswith(f"{name}:"))
    lines[number] = "  " + line
    (root / file).write_text("\n".join(lines))
    return number + 1


def test_a_run_is_called_by_its_profile_and_overrides():
    assert run_name("tiny") == "tiny"
    overrides = {"ppo.kl_weight": 0.05, "prepare.limit": None, "model.base": "random:2x32", "arms.a": {"seed": 1}}
    said = 'tiny · ppo.kl_weight=0.05 · prepare.limit=null · model.base=random:2x32 · arms.a={"seed": 1}'
    assert run_name("tiny", overrides) == said
    assert len(run_name("tiny", {"model.system_prompt": "long " * 100})) == LONGEST_NAME


@pytest.mark.parametrize("profile", profiles(ROOT))
def test_every_profile_is_valid(profile):
    assert load_params(ROOT, profile).arms


def test_all_mistakes_are_told_at_once(project):
    rewrite(project, "kl_weight", "kl_wieght: 0.1")
    rewrite(project, "epochs", "epochs: two")
    found = mistakes(project, prepare__flip_rate=0.7)
    assert len(found) == 4  # the unknown name, the missing one, the type, the range
    assert all(":" in line for line in found)


def test_a_mistake_names_file_and_line(project):
    line = rewrite(project, "flip_rate", "flip_rate: 0.75")
    assert mistakes(project)[0].startswith(f"params.yaml:{line}: prepare.flip_rate")


def test_a_mistake_in_a_profile_names_the_profile(project):
    line = rewrite(project, "limit", "limit: -1", "profiles/tiny.yaml")
    assert mistakes(project, "tiny")[0].startswith(f"tiny.yaml:{line}: prepare.limit")


def test_an_unknown_setting_gets_the_closest_name(project):
    assert mistakes(project, ppo__kl_weigth=0.1) == ["--set ppo.kl_weigth: unknown setting: did you mean kl_weight?"]
    assert mistakes(project, ppo={"kl_weigth": 0.1}) == [
        "--set ppo: ppo.kl_weigth: unknown setting: did you mean kl_weight?"
    ]


def test_a_section_that_there_is_not_is_blamed_on_the_override(project):
    [told] = mistakes(project, nope__deep__x=1)
    assert told.startswith("--set nope.deep.x: nope: unknown setting; known: seed, ")


def test_a_setting_on_the_command_line_is_named_once(project):
    [wrong] = mistakes(project, ppo__kl_weight=-1)
    assert wrong.startswith("--set ppo.kl_weight: input should be greater than or equal to 0")


@pytest.mark.parametrize("name", ["my profile", "a;b", "a.b", "größe", "-x", "$HOME", "default"])
def test_a_name_that_breaks_commands_or_folders_is_no_profiles(project, name):
    (project / "profiles" / f"{name}.yaml").write_text("seed: 2\n", encoding="utf-8")
    [told] = mistakes(project, name)
    assert told.startswith(f"profiles/{name}.yaml: rename it")


@pytest.mark.parametrize("name", ["../params", "profiles/tiny", "", "/etc/hosts", ".hidden", "tiny.yaml"])
def test_a_profile_is_a_file_of_its_folder_and_no_path(project, name):
    (project / "profiles" / ".hidden.yaml").write_text("seed: 2\n")
    [told] = mistakes(project, name)
    assert told.startswith(f"unknown profile {name!r}")


@pytest.mark.parametrize("name", ["A-1_c", "7b"])
def test_other_names_are(project, name):
    (project / "profiles" / f"{name}.yaml").write_text("seed: 2\n")
    assert load_params(project, name).seed == 2


LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()


@settings(deadline=None)
@given(st.recursive(LEAVES, lambda inside: st.lists(inside) | st.dictionaries(st.text(), inside), max_leaves=6))
@example(1e-5).via("YAML reads 1e-05 as text")
@example("12:30:00").via("YAML reads it as seconds")
@example("\x85").via("YAML breaks lines there")
def test_an_override_as_it_is_told_can_be_given_again(value):
    told = option("a.b", value)
    flag, given_again = shlex.split(told)
    assert flag == "--set"
    assert parse_override(given_again) == ("a.b", value)


def test_an_unknown_profile_gets_the_closest_name():
    assert mistakes(ROOT, "tiyn") == ["unknown profile 'tiyn': did you mean tiny?"]


def test_a_setting_given_twice_is_refused(project):
    rewrite(project, "gae_lambda", "gae_lambda: 0.95\n  gae_lambda: 0.9")
    assert "ppo.gae_lambda is given twice" in mistakes(project)[0]


@pytest.mark.parametrize(
    "value",
    [
        *("!!int x", "!!bool x", "!!timestamp x", "!!set {a}", "!!binary aGk=", "!!python/name:os.system", "0b_"),
        *("{[1]: 2}", "{<<: 1}", "*unknown", "&a {b: *a}", "&a [*a]", "[" * 10_000),
    ],
)
def test_what_no_setting_can_be_is_told_wherever_it_is_given(project, value):
    rewrite(project, "config", f"config: {value}")
    [told] = mistakes(project)
    assert re.match(r"params\.yaml(:\d+)?: not valid YAML: .", told)
    with pytest.raises(ParamsError, match="the value is not valid YAML"):
        parse_override(f"prepare.config={value}")
    with pytest.raises(ParamsError, match="expected settings and values"):
        parse_grid([f"prepare.config={value},1"])


def test_a_date_is_text(project):
    line = rewrite(project, "date", "date: 2025-02-28")
    assert load_params(project).model.date == parse_override("model.date=2025-02-28")[1] == "2025-02-28"
    assert parse_grid(["model.date=2025-02-28,2025-02-27"]) == {"model.date": ["2025-02-28", "2025-02-27"]}
    rewrite(project, "date", "date: 2025-02-30")
    assert mistakes(project)[0].startswith(f"params.yaml:{line}: model.date: day is out of range for month")


def test_a_number_that_yaml_reads_as_text_is_explained(project):
    rewrite(project, "learning_rate", "learning_rate: 1e-4")
    assert "text to YAML; write 1.0e-4" in mistakes(project)[0]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0, "0.1", None, True])
def test_a_weight_is_a_finite_number(value):
    assert "ppo.kl_weight" in mistakes(ROOT, ppo__kl_weight=value)[0]


@pytest.mark.parametrize(
    ("overrides", "word"),
    [
        ({"ppo__minibatch_size": 5}, "does not divide"),
        ({"prepare__shares__sft": 0.5}, "sum to"),
        ({"prepare__format": "hh"}, "together"),
        ({"tracking__candidate": "robst"}, "did you mean robust"),
        ({"arms": {"single": None, "robust": None}}, "at least 1 item"),
        *(({f"arms__{name}": {"reward": "single", "seed": 1}}, "lower-case") for name in ("Bad Name", "v2", "latest")),
        ({"arms": {"robust.4": {"reward": "single", "seed": 1}}, "tracking__candidate": "robust.4"}, "lower-case"),
        ({"arms__single__nominal_weight": 0.5}, "not a setting (for ppo, single): leave it out, or null"),
        ({"arms__robust__nominal_weight": None}, "arms.robust.nominal_weight: is missing (for ppo, robust)"),
        (
            {"ensemble__loss": "gaussian_nll", "ensemble__margin": 0.1},
            "ensemble.margin: it belongs to the loss bradley_terry",
        ),
        ({"reward__trunk": "full", "reward__train_layers": 16}, "16 is more than the 15 layers"),
        ({"reward__revision": "abc"}, "reward.base, which is null"),
        ({"ensemble__freeze_backbone": False}, "set reward.trunk to lora or full"),
        (
            {"ensemble__freeze_backbone": False, "ensemble__kind": "members"},
            "input should be True, found False (for members)",
        ),
        ({"ensemble__diversity": 0.1}, "input should be less than or equal to 0, found 0.1 (for heads)"),
        ({"ensemble__kind": "warm", "ensemble__hidden": 8}, "averages linear heads"),
        ({"ppo__estimator": "rloo"}, "ppo.estimator rloo compares responses to one prompt"),
        ({"ppo__responses_per_prompt": 3, "ppo__minibatch_size": 64}, "prompts_per_update 24 * responses_per_prompt 3"),
        ({"ppo__kl_in": "loss"}, "k1 has a gradient of expectation 0"),
        ({"ppo__kl_target": 6.0, "ppo__kl_weight": 0.0}, "ppo.kl_weight: 0 stays 0"),
        ({"ppo__kl_target": 6.0, "ppo__max_kl": 5.0}, "5 ends the training before ppo.kl_target 6"),
        (
            {"ppo__prompts_per_update": 5, "ppo__responses_per_prompt": 4, "ppo__minibatch_size": 4}
            | {"launch__processes": 2, "launch__arms_at_once": 1},
            "ppo.prompts_per_update: 5 is not a multiple of launch.processes 2",
        ),
        ({"arms__robust__reward": "robst"}, "there is no 'robst': did you mean robust?"),
        (
            {"arms__a": {"reward": "ellipsoid", "credible": 2.0, "seed": 1}, "ensemble__sigma": "learned"},
            "set ensemble.sigma to posterior",
        ),
        ({"arms__robust__reward": "uwo"}, "arms.robust.uncertainty_weight: is missing (for ppo, uwo)"),
        (
            {"arms__robust__functions": {"no_lists": 0.5}},
            "write module:function, for example my_rules:no_lists, found 'no_lists'",
        ),
        ({"arms__robust__functions": {"my_rules.py:no_lists()": 0.5}}, "write module:function"),
        ({"arms__robust__functions": {"my_rules:no_lists": "0.5"}}, "arms.robust.functions.my_rules:no_lists"),
        ({"arms__robust__functions": {"my_rules:no_lists": float("inf")}}, "finite number"),
        ({"arms__single__reward": None}, "arms.single.reward: is missing (for ppo)"),
        ({"arms__single__n": 4}, "not a setting (for ppo, single)"),
        ({"arms__a": {"method": "dpo", "reward": "single", "seed": 1}}, "arms.a.reward: not a setting (for dpo)"),
        (
            {"arms__a": {"method": "dpo", "nominal_weight": 0.4, "seed": 1}},
            "arms.a.nominal_weight: not a setting (for dpo)",
        ),
        ({"arms__a": {"method": "best_of_n", "reward": "single", "seed": 1}}, "arms.a.n: is missing"),
        ({"arms__a": {"method": "best_of_n", "n": 4, "seed": 1}}, "arms.a.reward: is missing (for best_of_n)"),
        ({"arms__a": CHOOSY, "best_of_n__samples": 3}, "arms.a.n: 4 is more than best_of_n.samples 3"),
        ({"arms__a": CHOOSY, "tracking__candidate": "a"}, "'a' chooses the best of n and is no model of its own"),
        (
            {"dpo__loss": "ipo", "dpo__label_smoothing": 0.1},
            "label_smoothing: it belongs to the loss sigmoid, not to ipo",
        ),
        ({"evaluate__judge": {"address": "https://a/v1"}}, "evaluate.judge.name: is missing"),
        ({"evaluate__judge": {"name": "x"}}, "evaluate.judge: write {address: ..., name: ...} for one that is asked"),
        ({"evaluate__judge": "gpt"}, "evaluate.judge: write {address: ..., name: ...} for one that is asked"),
        ({"evaluate__judge": {"base": "a", "name": "x"}}, "evaluate.judge.name: not a setting (for reward)"),
        ({"evaluate__judge": {"address": "a/v1", "name": "x"}}, "write an address such as https://"),
        ({"evaluate__judge": JUDGE | {"key_variable": "KEYS"}}, "name an environment variable as those of secrets"),
        ({"evaluate__judge": JUDGE | {"model": "x"}}, "evaluate.judge.model: unknown setting"),
        ({"evaluate__judge": JUDGE | {"options": {"api": "sk-" + "x" * 20}}}, "it holds a password or a key"),
        (
            {"dpo__pairs_per_batch": 5, "launch__processes": 2, "launch__arms_at_once": 1},
            "dpo.pairs_per_batch: 5 is not a multiple of launch.processes 2",
        ),
    ],
)
def test_contradictions_are_told(overrides, word):
    assert word in "\n".join(mistakes(ROOT, **overrides))


def test_a_setting_that_a_file_of_an_earlier_version_lacks_is_named_with_the_way_to_it(project):
    rewrite(project, "runner", "")
    [said] = mistakes(project)
    assert ": launch.runner: is missing; `rrlhf init` in an empty folder writes a params.yaml with all" in said


def test_null_removes_an_arm():
    params = load_params(ROOT, overrides={"arms.single": None})
    assert list(params.arms) == ["robust"]


def test_a_reward_function_is_named_by_import_path():
    chosen = dict([parse_override("arms.robust.functions={my_rules:no_lists: -0.5, package.verify:correct: 2}")])
    arm = load_params(ROOT, overrides=chosen).arms["robust"]
    assert arm.functions == {"my_rules:no_lists": -0.5, "package.verify:correct": 2.0}
    assert arm.settings == {"nominal_weight": 0.4, "credible": 8.0}


@pytest.mark.parametrize(
    ("arm", "written"),
    [
        ({"reward": "single", "seed": 1}, {"reward": "single", "seed": 1}),
        ({"method": "dpo", "seed": 2}, {"method": "dpo", "seed": 2}),
        (CHOOSY, CHOOSY),
    ],
)
def test_an_arm_is_written_without_what_its_method_does_not_use(arm, written):
    known = typed_arm(**arm)
    assert known.model_dump() == written
    assert typed_arm(**json.loads(known.model_dump_json())) == known


def test_an_override_is_read_as_yaml():
    assert parse_override("ppo.kl_weight=0.05") == ("ppo.kl_weight", 0.05)
    assert parse_override("prepare.limit=null") == ("prepare.limit", None)


@pytest.mark.parametrize("text", ["ppo.kl_weight", "=1", "a=[1"])
def test_a_malformed_override_is_refused(text):
    with pytest.raises(ParamsError):
        parse_override(text)


@pytest.mark.parametrize("content", [b"\xff\xfe", b"- a list", b"a: [1", b""])
def test_a_file_that_is_no_mapping_is_refused(project, content):
    (project / "params.yaml").write_bytes(content)
    assert mistakes(project)[0].startswith("params.yaml")


@pytest.mark.parametrize("reward", REWARDS)
def test_an_arm_takes_the_settings_of_its_reward_and_no_other(reward):
    given = dict.fromkeys(REWARDS[reward], 0.5)
    for made in ({"method": "ppo"}, {"method": "best_of_n", "n": 2}):
        arm = typed_arm(reward=reward, seed=1, **made, **given)
        assert (arm.reward, arm.settings) == (reward, given)
    all_of_them = {name for each in REWARDS.values() for name in each}
    for name in all_of_them - set(given):
        with pytest.raises(ValidationError):
            typed_arm(reward=reward, seed=1, **given, **{name: 0.5})
    for name in given:
        with pytest.raises(ValidationError):
            typed_arm(reward=reward, seed=1, **{other: 0.5 for other in given if other != name})


def test_the_docs_tell_every_reward_with_its_settings():
    table = (ROOT / "docs" / "rewards.md").read_text(encoding="utf-8").split("| `reward` |")[1].split("\n\n")[0]
    rows = [line.strip("|").split("|") for line in table.splitlines()[2:]]
    told = {name: set(re.findall(r"`(\w+)`", row[-1])) for row in rows for name in re.findall(r"`(\w+)`", row[0])}
    assert told == {name: set(settings) for name, settings in REWARDS.items()}
