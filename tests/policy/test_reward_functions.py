"""Rules and verifiers of the user: finding them, calling them, and what a policy is paid for them."""

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest
import torch
from accelerate import Accelerator
from conftest import save_random_heads
from hypothesis import given, settings
from hypothesis import strategies as st

from rrlhf.config import typed_arm
from rrlhf.data.tables import read_table, write_tables
from rrlhf.located import ParamsError
from rrlhf.models.load import load_base, save_model
from rrlhf.pipeline.check import check_columns, check_sources
from rrlhf.pipeline.params import load_params
from rrlhf.pipeline.plan import Project
from rrlhf.policy.reading import Asked, load_judges, read_responses, sample_responses
from rrlhf.policy.reward import RewardScores, arm_reward, reward_metrics, write_arm
from rrlhf.policy.reward_functions import load_functions, metric_names
from rrlhf.robust import AGGREGATIONS, Scores
from rrlhf.sourcecode import code_behind
from rrlhf.stages import best_of_n, evaluate, ppo
from rrlhf.types import SUMMARY

PROMPTS = [[{"role": "user", "content": "Say a"}], [{"role": "user", "content": "Say b"}]]
OWN = {"my_rules", "checks", "broken", "script"}
ALONE = Accelerator(cpu=True)
RESPONSES, TOKENS, FINISHED = ["aa", "b"], [[7, 7, 1], [8]], [True, False]


@pytest.fixture
def rules(tmp_path, monkeypatch):
    """A project's folder, and a way to write modules into it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    before = set(sys.modules)

    def write(text, file="my_rules.py"):
        path = tmp_path / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        code_behind.cache_clear()

    yield write
    code_behind.cache_clear()
    for name in set(sys.modules) - before:
        if name.partition(".")[0] in OWN:
            del sys.modules[name]


def values(path):
    (function,) = load_functions([path])
    return function.values(PROMPTS, RESPONSES, TOKENS, FINISHED)


def mistakes(*paths):
    with pytest.raises(ParamsError) as error:
        load_functions(paths)
    return str(error.value).splitlines()


def test_a_function_gets_what_trl_gives_it(rules):
    rules("seen = {}\ndef keep(**kwargs):\n    seen.update(kwargs)\n    return [1, 2]\n")
    assert values("my_rules:keep") == [1.0, 2.0]
    assert sys.modules["my_rules"].seen == {
        "prompts": PROMPTS,
        "completions": [[{"role": "assistant", "content": text}] for text in RESPONSES],
        "completion_ids": TOKENS,
        "finished": FINISHED,
    }


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("def f(completions): return [len(c[0]['content']) for c in completions]", [2.0, 1.0]),
        ("def f(finished, *, prompts): return [ended + len(p) for ended, p in zip(finished, prompts)]", [2.0, 1.0]),
        ("def f(completion_ids, scale=0.5, *args): return [scale * len(ids) for ids in completion_ids]", [1.5, 0.5]),
        ("import torch\ndef f(**_): return torch.tensor([0.5, -1])", [0.5, -1.0]),
        ("import numpy as np\ndef f(**_): return np.array([True, False])", [1.0, 0.0]),
        ("import torch\ndef f(**_): return [torch.tensor(0.5), None]", [0.5, 0.0]),
        ("async def f(completions, **_): return [3, 4]", [3.0, 4.0]),
        ("class Rule:\n    def __call__(self, prompts): return (5, 6)\nf = Rule()", [5.0, 6.0]),
    ],
)
def test_functions_of_any_shape_are_called_with_what_they_take(rules, text, expected):
    rules(text)
    assert values("my_rules:f") == expected


def test_columns_of_the_data_come_by_name_as_in_trl(rules):
    rules(
        "seen = {}\n"
        "def some(completions, answer, scale=1, *, absent=None):\n    seen.update(locals())\n    return [0, 0]\n"
        "def all(**kwargs):\n    seen.update(kwargs)\n    return kwargs['answer']\n"
    )
    columns = {"answer": [4, 5], "scale": [[1], None], "prompts": ["not", "these"]}
    some, everything = load_functions(["my_rules:some", "my_rules:all"], columns)[::-1]
    seen = sys.modules["my_rules"].seen
    some.values(PROMPTS, RESPONSES, TOKENS, FINISHED, columns)
    assert (seen["answer"], seen["scale"], seen["absent"]) == ([4, 5], [[1], None], None)
    assert everything.values(PROMPTS, RESPONSES, TOKENS, FINISHED, columns) == [4.0, 5.0]
    assert seen["prompts"] == PROMPTS
    seen["scale"][0].append(2)
    assert columns["scale"][0] == [1]


def test_a_column_that_the_data_lacks_is_told_with_those_that_it_has(rules):
    rules("def solved(completions, solution, *, level, **_): pass\ndef either(completions, solution=None): pass\n")
    assert len(load_functions(["my_rules:solved", "my_rules:either"])) == 2  # not known yet
    with pytest.raises(ParamsError) as error:
        load_functions(["my_rules:solved", "my_rules:either"], ["level", "id"])
    assert str(error.value) == (
        "reward function my_rules:solved: it needs solution; there are prompts, completions, completion_ids, finished, "
        "and the data has the columns id, level"
    )


def test_once_a_data_set_is_made_its_columns_are_held_against_the_arms(rules, tmp_path):
    rules("def solved(completions, solution): pass\n")
    arm = {"arms.robust.functions": {"my_rules:solved": 1.0}}
    project = Project(tmp_path, "tiny", load_params(Path(__file__).parents[2], "tiny", arm))
    (tmp_path / SUMMARY).write_text('{"columns": ["solution"]}')
    check_columns(project, tmp_path)
    (tmp_path / SUMMARY).write_text('{"columns": ["level"]}')
    with pytest.raises(ParamsError, match=r"it needs solution; .* the data has the columns level"):
        check_columns(project, tmp_path)


def test_a_function_may_change_what_it_was_given(rules):
    rules("def f(prompts, **_):\n    prompts[0][0]['content'] = prompts.pop()\n    return [0, 0]\n")
    asked = [[dict(turn) for turn in prompt] for prompt in PROMPTS]
    values("my_rules:f")
    assert asked == PROMPTS


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("def f(**_): return [1, 2, 3]", "my_rules:f returned 3 values for 2 responses"),
        ("def f(**_): return 1.0", "my_rules:f returned float: expected a list of one number per response"),
        ("def f(**_): return [0, float('nan')]", "my_rules:f: value nan of response 1 ('b') is no finite number"),
        ("def f(**_): return [0, -float('inf')]", "value -inf of response 1 ('b') is no finite number"),
        ("def f(**_): return ['1', 0]", "value '1' of response 0 ('aa') is no finite number"),
        ("def f(**_): return [[1], [2]]", "value [1] of response 0 ('aa') is no finite number"),
        ("\ndef f(**_):\n    return 1 / 0", "raised ZeroDivisionError: division by zero"),
        ("\ndef f(**_):\n    return 1 / 0", "my_rules.py:3)"),
        ("async def f(**_): raise OSError('away')", "my_rules:f raised OSError: away"),
    ],
)
def test_a_bad_answer_is_told_with_function_and_place(rules, text, told):
    rules(text)
    with pytest.raises(ValueError, match=r"^reward function my_rules:f") as error:
        values("my_rules:f")
    assert told in str(error.value)


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("my_rulez:f", "no module my_rulez in {root} or among what is installed"),
        ("my_rulez:f", ": did you mean my_rules?"),
        ("check.exact:f", "no module check in {root} or "),
        ("checks.exactly:f", "no module checks.exactly in {root}/checks: did you mean exact?"),
        ("my_rules.exact:f", "no module my_rules.exact in my_rules, which is no package"),
        ("my_rules:no_list", "my_rules has no function no_list: did you mean no_lists?"),
        ("my_rules:WEIGHT", "WEIGHT is float, not a function"),
        ("broken:f", "importing broken raised ModuleNotFoundError: No module named 'nowhere' ({root}/broken.py:2)"),
        ("script:f", "importing script raised SystemExit: 3"),
        ("typo:f", "{root}/typo.py:1: not valid Python"),
    ],
)
def test_a_function_that_cannot_be_had_is_told_in_words(rules, tmp_path, path, told):
    rules("WEIGHT = 0.5\ndef no_lists(**_): pass\n")
    rules("", "checks/exact.py")
    rules("\nimport nowhere\n", "broken.py")
    rules("raise SystemExit(3)", "script.py")
    rules("def f(:", "typo.py")
    (line,) = mistakes(path)
    assert line.startswith(f"reward function {path}: ")
    assert told.format(root=tmp_path) in line


def test_all_functions_that_cannot_be_had_are_told_at_once(rules):
    rules("def f(**_): pass\n")
    assert len(mistakes("my_rules:f", "my_rules:g", "nowhere:f")) == 2


def test_a_run_tells_them_with_its_other_mistakes_before_it_computes(rules, tmp_path):
    chosen = {"arms.robust.functions": {"nowhere:f": 1}, "arms.single.functions": {"nowhere:f": 1, "my_rules:g": 1}}
    source = {"prepare.source": "nowhere.jsonl", "prepare.format": "rows"}
    rules("def f(**_): pass\n")
    (tmp_path / ".dvc").mkdir()
    (tmp_path / ".dvc" / "config").touch()
    with pytest.raises(ParamsError) as error:
        check_sources(Project(tmp_path, "tiny", load_params(Path(__file__).parents[2], "tiny", chosen | source)))
    told = str(error.value).splitlines()
    assert [line.split("'")[1] if "'" in line else line.split(":")[0] for line in told] == [
        "nowhere.jsonl",
        "reward function my_rules",
        "reward function nowhere",
    ]


def test_functions_lie_in_packages_with_and_without_init(rules):
    rules("from .size import scale\ndef f(completions): return [scale, scale]\n", "checks/deep/exact.py")
    rules("scale = 3\n", "checks/deep/size.py")
    assert values("checks.deep.exact:f") == [3.0, 3.0]


def test_two_functions_of_one_name_are_told_apart_in_metrics():
    assert metric_names(["a:f", "b.c:f", "a:g"]) == {
        "a:f": "function_a.f",
        "b.c:f": "function_b.c.f",
        "a:g": "function_g",
    }


finite = st.floats(-10, 10)


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from(["a:f", "a:g", "b:f"]), finite), st.lists(finite, min_size=3, max_size=3))
def test_an_arm_is_paid_its_reward_plus_the_weighted_functions(weights, drawn):
    scores = Scores(torch.tensor([[0.3, -1.0], [2.0, 1.0]]), torch.tensor([[0.1, 0.2], [0.4, 0.3]]))
    functions = {path: torch.tensor([x, 1 - x]) for path, x in zip(["a:f", "a:g", "b:f"], drawn, strict=True)}
    found = RewardScores(torch.tensor([0.5, -0.5]), scores, functions)
    robust = [0.4 * 0.3 + 0.6 * -1.0, 0.4 * 1.0 + 0.6 * 1.0]
    for reward, chosen, base in (
        ("single", {}, [0.5, -0.5]),
        ("robust", {"nominal_weight": 0.4, "credible": 0.0}, robust),
        ("constant", {}, [0.0, 0.0]),
    ):
        arm = typed_arm(reward=reward, functions=weights, seed=1, **chosen)
        paid = arm_reward(arm, ALONE)(found)
        expected = [b + math.fsum(w * functions[p][i].item() for p, w in weights.items()) for i, b in enumerate(base)]
        torch.testing.assert_close(paid, torch.tensor(expected), atol=1e-4, rtol=1e-6)


def test_the_order_in_which_functions_are_named_changes_no_bit():
    functions = {name: torch.randn(50) for name in ("a:f", "b:f", "c:f")}
    found = RewardScores(torch.randn(50), Scores(torch.randn(50, 3), torch.rand(50, 3)), functions)
    one, other = (
        typed_arm(reward="single", functions={name: 0.1 * ord(name[0]) for name in order}, seed=1)
        for order in (["a:f", "b:f", "c:f"], ["c:f", "a:f", "b:f"])
    )
    assert torch.equal(arm_reward(one, ALONE)(found), arm_reward(other, ALONE)(found))


def test_each_process_adds_the_values_of_its_own_responses():
    """The ensemble's part is computed on everybody's responses, the functions' part on each process's own."""
    scores, value = Scores(torch.randn(6, 3), torch.rand(6, 3)), torch.randn(6)
    arm = typed_arm(reward="batch_robust", nominal_weight=0.4, credible=2.0, functions={"a:f": 2.0}, seed=1)
    parts = []
    for rank, own in enumerate((slice(0, 3), slice(3, 6))):
        everyone = iter([value, *scores])
        engine = SimpleNamespace(process_index=rank, gather=lambda part, everyone=everyone: next(everyone))
        found = RewardScores(value[own], Scores(scores.mean[own], scores.std[own]), {"a:f": value[own]})
        parts.append(arm_reward(arm, engine)(found))
    expected = AGGREGATIONS["batch_robust"](scores, nominal_weight=0.4, credible=2.0) + 2 * value
    torch.testing.assert_close(torch.cat(parts), expected, atol=1e-6, rtol=0)


def test_the_mean_value_of_each_function_is_a_metric():
    scores = Scores(torch.randn(2, 3), torch.rand(2, 3))
    found = reward_metrics(RewardScores(torch.randn(2), scores, {"a:f": torch.tensor([1.0, 4.0])}))
    assert found["function_f"] == 2.5


@pytest.fixture(scope="module")
def letters(tmp_path_factory):
    """Prompts, and a model that now and then says e and now and then ends, beside reward models of random weights."""
    root = tmp_path_factory.mktemp("letters")
    params = load_params(
        Path(__file__).parents[2],
        "tiny",
        {"ppo.updates": 10, "ppo.learning_rate": 0.01, "ppo.prompts_per_update": 64, "ppo.minibatch_size": 32}
        | {"ppo.kl_weight": 0.0, "ppo.missing_eos_score": -4.0, "model.response_tokens": 4},
    )
    asked = [
        {"prompt": [{"role": "user", "content": f"Say {n}"}], "columns": json.dumps({"number": n} if n else {})}
        for n in range(8)
    ]
    (root / "data").mkdir()
    write_tables(root / "data", (("ppo", each) for each in asked))
    write_tables(root / "data", (("evaluate", each) for each in asked))
    (root / "data" / "summary.json").write_text('{"columns": ["number", "of_another_table"]}')
    language = load_base(params.model)
    with torch.no_grad():
        state = language.network.model(torch.arange(6, 100)[None]).last_hidden_state.mean((0, 1))
        for token in (language.tokenizer.eos_token_id, language.tokenizer.convert_tokens_to_ids("e")):
            language.network.lm_head.weight[token] += 3 * state / state.dot(state)
    save_model(language, root / "sft")
    for name, heads in (("reward", 1), ("ensemble", 3)):
        save_random_heads(root / name, heads)
    return root, params


def test_a_policy_says_what_a_rule_pays_for(rules, letters, tmp_path):
    """Two policies, alike but for the weight: 0 notes the function's values and pays nothing for them."""
    rules(
        "def share_of_e(completions, **kwargs):\n"
        "    texts = [completion[0]['content'] for completion in completions]\n"
        "    return [text.count('e') / max(len(text), 1) for text in texts]\n"
    )
    root, params = letters
    inputs = {name: root / name for name in ("data", "sft", "reward", "ensemble")}

    def shares(weight):
        arm = typed_arm(reward="constant", functions={"my_rules:share_of_e": weight}, seed=1)
        out, rows = tmp_path / str(weight), []
        out.mkdir()
        ppo.run(model=params.model, ppo=params.ppo, health=params.health, arm=arm, **inputs, out=out, log=rows.append)
        said = pq.read_table(out / "rollouts.parquet").to_pylist()
        by_hand = [row["response"].count("e") / max(len(row["response"]), 1) for row in said if row["update"] == 9]
        assert rows[-1]["function_share_of_e"] == pytest.approx(sum(by_hand) / 64, abs=1e-6)
        return [row["function_share_of_e"] for row in rows]

    paid, unpaid = shares(4.0), shares(0.0)
    assert paid[0] == unpaid[0]
    assert sum(paid[-4:]) > 1.5 * sum(unpaid[-4:])


NUMBERED = """
def as_asked(prompts, completions, number, of_another_table, **kwargs):
    assert set(of_another_table) == {None}
    asked = [prompt[-1]["content"] for prompt in prompts]
    assert asked == [f"Say {n or 0}" for n in number], (asked, number)
    assert len(completions) == len(number) == len(of_another_table)
    return [float(n or 0) for n in number]
"""


def test_every_response_is_read_with_the_columns_of_its_own_prompt(rules, letters, tmp_path):
    """In training, in best-of-n and in the comparison; a row that lacks a column has None there."""
    rules(NUMBERED)
    root, params = letters
    inputs = {name: root / name for name in ("data", "sft", "reward", "ensemble")}
    policies, rows = {}, []
    for name, stage, sections in (
        ("trained", ppo, {"ppo": params.ppo.model_copy(update={"updates": 2}), "health": params.health}),
        ("chosen", best_of_n, {"best_of_n": params.best_of_n.model_copy(update={"samples": 3})}),
    ):
        chosen = {"method": "best_of_n", "n": 2} if stage is best_of_n else {}
        arm = typed_arm(reward="constant", functions={"my_rules:as_asked": 1.0}, seed=1, **chosen)
        policies[name] = tmp_path / name
        policies[name].mkdir()
        stage.run(model=params.model, arm=arm, **sections, **inputs, out=policies[name], log=rows.append)
    settings = params.evaluate.model_copy(update={"samples_per_prompt": 2})
    asked = Asked(read_table(root / "data", "evaluate"), params.model, settings, 1)
    judges = load_judges(asked, params.gold, inputs, load_functions(["my_rules:as_asked"]))
    reading = read_responses(judges, asked, sample_responses(asked, root / "sft", "sft"), "sft")
    assert reading.functions["my_rules:as_asked"].tolist() == [float(n) for n in range(8) for _ in range(2)]


@pytest.mark.parametrize("stage", [ppo, best_of_n, evaluate])
def test_a_column_that_the_data_set_lacks_ends_a_stage_before_it_begins(rules, letters, tmp_path, stage):
    rules("def solved(completions, solution): return [0.0] * len(completions)\n")
    root, params = letters
    arm = typed_arm(reward="constant", functions={"my_rules:solved": 1.0}, seed=1)
    inputs = {name: root / name for name in ("data", "sft", "reward", "ensemble")}
    sections = {
        ppo: {"ppo": params.ppo, "health": params.health, "arm": arm},
        best_of_n: {"best_of_n": params.best_of_n, "arm": typed_arm(method="best_of_n", n=2, **arm.model_dump())},
        evaluate: {"seed": 1, "gold": params.gold, "evaluate": params.evaluate, "policies": {"robust": tmp_path}},
    }[stage]
    write_arm(tmp_path, arm)
    inputs |= {"sft": tmp_path / "nothing was loaded from here"}
    with pytest.raises(
        ValueError, match=r"my_rules:solved: it needs solution; .* the data has the columns number, of_another_table"
    ):
        stage.run(model=params.model, **sections, **inputs, out=tmp_path, log=print)
