"""Tables and Markdown of a run: what is in them, and that nothing in them acts on the page."""

import json

from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from rrlhf.execution.pages import ancestry, comparison, percent_done, plan_rows
from rrlhf.judging.content import Measured
from rrlhf.judging.evaluation import Evaluation, Policy
from rrlhf.pipeline.plan import Planned, total
from rrlhf.pipeline.tracking.tracker import Version
from rrlhf.tools.lineage.lookup import graph_of
from rrlhf.tools.reporting.tables import Table, escaped, markdown
from rrlhf.tools.sweeps.comparison import Found, compared
from rrlhf.tools.sweeps.show import Sweep, as_markdown

PLAN = [
    Planned("data", "reuse", [], None),
    Planned("sft", "run", ["sft.epochs 1 -> 2", "more"], 30.0),
    Planned("reward", "upstream", ["after sft"], 10.0),
    Planned("ppo-robust", "upstream", ["after sft, reward"], None),
    Planned("ppo-single", "skip", ["after sft"], 99.0),
]
PAGE = MarkdownIt("commonmark").enable("table")


def test_a_plan_is_a_table_with_first_reasons_and_expected_times():
    rows = plan_rows(PLAN)
    assert rows[1] == {
        "node": "sft",
        "action": "run",
        "first reason": "sft.epochs 1 -> 2",
        "expected time": "30 s",
    }
    assert rows[0] == {"node": "data", "action": "reuse", "first reason": "", "expected time": ""}
    assert [row["node"] for row in rows] == [one.node for one in PLAN]
    assert total(PLAN) == "1 to run, up to 2 after them; at least 40 s by earlier runs"


def test_progress_counts_what_computes():
    assert percent_done(PLAN, ["data"]) == 0
    assert percent_done(PLAN, ["data", "sft"]) == 100 / 3
    assert percent_done(PLAN, ["sft", "reward", "ppo-robust"]) == 100
    assert percent_done([one._replace(action="reuse") for one in PLAN], []) == 100


@given(st.text(max_size=30))
def test_a_text_is_shown_as_it_is(text):
    shown = PAGE.parse(f"- x{escaped(text)}")
    assert not {"code_inline", "link_open", "em_open", "strong_open", "html_inline", "image"} & {
        child.type for token in shown for child in token.children or []
    }
    tables = Table("", ["a", text], [[text, text]] * 2), Table("", ["a", "b"], [["c", "d"]] * 2)
    assert len(PAGE.parse(markdown(tables[0]))) == len(PAGE.parse(markdown(tables[1])))


def policy(name, gold, **others):
    metrics = {"gold": Measured(gold, 0.1, 9)} if gold is not None else {}
    return Policy(name, "single", {}, metrics | others)


def compare(*policies, **more):
    evaluation = Evaluation([*policies], curves=[], samples=[], reward_models=[])
    return comparison(evaluation, more.get("said", []), "reports/tiny.html", more.get("links", {}))


def test_the_comparison_has_a_column_for_each_policy_and_marks_the_best():
    policies = policy("one", 1.0), policy("a_|b|", 2.0, kl=Measured(0.5, 0.25, 9)), policy("other", None)
    links = {"one": "http://127.0.0.1:5000/#/models/rrlhf-policy/versions/3"}
    shown = compare(*policies, said=["a_|b| ends highest."], links=links)
    header, _, *rows = [line for line in shown.splitlines() if line.startswith("|")]
    assert header == r"|  | one one reward head | a\_\|b\| one reward head | other one reward head |"
    assert rows == ["| gold | 1.00 ± 0.10 | ★ 2.00 ± 0.10 | – |", "| kl | – | 0.50 ± 0.25 | – |"]
    assert f"in MLflow: [one]({links['one']})" in shown
    assert r"- a\_\|b\| ends highest." in shown
    assert shown.endswith("report: reports/tiny.html")


def test_lineage_is_a_tree_with_links_where_mlflow_has_pages():
    made = {"stage": "sft", "digest": "ab" * 32, "inputs": {"data": "md5:00"}, "input_keys": {}, "git_commit": None}
    tags = {"rrlhf.key": "cd" * 32, "rrlhf.node": "sft", "rrlhf.made": json.dumps(made)}
    graph = graph_of([Version("rrlhf-sft", "1", ("latest",), tags)])
    [read] = [
        token for token in PAGE.parse(ancestry(graph, graph.find("rrlhf-sft/1"), None)) if token.type == "code_block"
    ]
    assert read.content.startswith("rrlhf-sft v1")
    linked = ancestry(graph, graph.find("rrlhf-sft/1"), "http://127.0.0.1:5000")
    assert linked.startswith("    rrlhf-sft v1")
    assert linked.endswith("\n\n- [rrlhf-sft v1](http://127.0.0.1:5000/#/models/rrlhf-sft/versions/1)")


def test_a_sweep_is_a_table_with_its_legend():
    rows = compared([Found({"ppo.kl_weight": 0.1}, "robust", "v", {"gold": Measured(1.0, 0.1, 20)})])
    shown = as_markdown(Sweep("x", {}, {}, rows))
    assert "| policy | gold |" in shown
    assert r"| robust kl\_weight 0.1 | 1.00 ± 0.21 |" in shown
    assert "over prompts" in shown
