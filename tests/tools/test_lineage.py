"""Ancestry is drawn from what versions and artifacts say of themselves; the versions here are written by hand."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rrlhf.pipeline.ancestry import Graph, Product
from rrlhf.pipeline.tracking.tracker import Version
from rrlhf.tools.lineage.diff import digest_start
from rrlhf.tools.lineage.lookup import graph_of
from rrlhf.tools.lineage.text import as_json, dot, mermaid, page, tree

DATA = "md5:d41d8cd98f00b204e9800998ecf8427e.dir"


def version(name, number, node, digest, inputs, aliases=(), *, key=None, input_keys=()):
    made = {"stage": node.partition("-")[0], "digest": digest if len(digest) > 1 else digest * 64, "inputs": inputs}
    made |= {"input_keys": dict(input_keys), "git_commit": None}
    tags = {"rrlhf.node": node, "rrlhf.key": key or digest.upper() * 64, "rrlhf.made": json.dumps(made)}
    return Version(name, number, tuple(aliases), tags | {"rrlhf.data": "default"})


SFT = version("rrlhf-sft", "1", "sft", "a", {"data": DATA, "base": "random:2x32"})
REWARD = version("rrlhf-reward", "1", "reward", "b", {"data": DATA, "sft": "a" * 64})
POLICY = version(
    "rrlhf-policy", "2", "ppo-robust", "c", {"sft": "a" * 64, "reward": "b" * 64, "data": DATA}, ["candidate"]
)
LOST = version("rrlhf-policy", "1", "ppo-single", "d", {"ensemble": "e" * 64})
VERSIONS = [LOST, POLICY, REWARD, SFT]


@pytest.fixture
def graph():
    return graph_of(VERSIONS)


@pytest.fixture
def policy(graph):
    return graph.find("rrlhf-policy@candidate")


def test_a_tree_reaches_the_data_set_and_draws_a_shared_node_once(graph, policy):
    assert tree(graph, policy).splitlines() == [
        "rrlhf-policy v2 (candidate) · ppo-robust · cccccccc",
        "├── data default md5:d41d8cd9",
        "├── rrlhf-reward v1 · reward · bbbbbbbb",
        "│   ├── data default md5:d41d8cd9",
        "│   └── rrlhf-sft v1 · sft · aaaaaaaa",
        "│       ├── data default md5:d41d8cd9",
        "│       └── base random:2x32",
        "└── rrlhf-sft v1 · sft · aaaaaaaa (see above)",
    ]


def test_downwards_a_tree_draws_what_was_made_below_the_last_of_its_inputs(graph):
    expected = [
        "data default md5:d41d8cd9",
        "└── rrlhf-sft v1 · sft · aaaaaaaa",
        "    └── rrlhf-reward v1 · reward · bbbbbbbb",
        "        └── rrlhf-policy v2 (candidate) · ppo-robust · cccccccc",
    ]
    assert tree(graph, graph.find("data"), down=True).splitlines() == expected
    assert tree(graph, graph.find("random:2x32"), down=True).splitlines()[1:] == expected[1:]


def test_an_input_that_nobody_registered_is_named_by_its_digest(graph):
    drawn = tree(graph, graph.find("rrlhf-policy/1")).splitlines()
    assert drawn[1] == "└── ensemble · eeeeeeee (not registered)"


@pytest.mark.parametrize(
    "reference",
    [
        "rrlhf-policy@candidate",
        "rrlhf-policy/2",
        "rrlhf-policy@latest",
        "cccccc",
        "models:/rrlhf-policy/2",
        "ppo-robust",
    ],
)
def test_a_product_is_found_by_alias_number_digest_or_node(reference):
    assert graph_of([POLICY, LOST, REWARD, SFT]).find(reference).names == ("rrlhf-policy/2",)


@pytest.mark.parametrize("reference", ["default", "data", "d41d8c", "md5:d41d8cd98f", DATA])
def test_a_data_set_is_found_by_name_or_digest(graph, reference):
    assert graph.find(reference).digest == DATA


def test_a_data_set_that_two_profiles_share_is_found_by_both():
    """It carries the name of the one for which it was made."""
    graph = graph_of([version("rrlhf-tiny-sft", "1", "sft", "a", {"data": DATA}), *VERSIONS])
    assert graph.find("data", "tiny") is graph.find("data") is graph.find("default")
    with pytest.raises(ValueError, match="profile hh has no data yet"):
        graph.find("data", "hh")


def test_versions_of_one_making_are_one_product(graph):
    again = version("rrlhf-sft", "2", "sft", "a", {"data": DATA}, ["best"])
    found = graph_of([again, *VERSIONS]).find("aaaaaa")
    assert (found.names, found.aliases) == (("rrlhf-sft/2", "rrlhf-sft/1"), ("rrlhf-sft@best",))


def test_of_two_makings_of_one_content_a_model_came_from_the_one_with_its_own_data():
    other = "md5:00000000000000000000000000000000.dir"
    twin = version("rrlhf-sft", "2", "sft", "a", {"data": other, "base": "random:2x32"}, key="another")
    reads = {"sft": "a" * 64, "data": other}  # the other data, and yet it read the first model
    policy = version("rrlhf-policy", "2", "ppo-robust", "c", reads, input_keys={"sft": "A" * 64})
    graph = graph_of([twin, policy, SFT])
    above = {each.digest for each in graph.up(graph.find("rrlhf-sft/1"))}
    assert graph.sources[graph.find("rrlhf-policy/2")][1].source is graph.find("rrlhf-sft/1")
    assert DATA in above
    assert other not in above
    assert graph.built_on("another") == []
    assert graph.built_on("A" * 64) == [graph.find("rrlhf-policy/2")]


def test_the_latest_of_a_name_is_its_highest_number_whatever_else_a_model_is_called():
    """An old model of one profile that another registers today."""
    again = version("rrlhf-tiny-sft", "1", "sft", "a", {"data": DATA})
    newer = version("rrlhf-sft", "2", "sft", "f", {"data": DATA})
    graph = graph_of([again, newer, SFT])
    assert graph.find("rrlhf-sft@latest") is graph.find("rrlhf-sft/2")
    assert graph.find("rrlhf-tiny-sft@latest") is graph.find("rrlhf-sft/1")
    assert graph_of([again, newer, SFT], "tiny").find("rrlhf-sft/1").title == "rrlhf-tiny-sft v1"
    assert graph.find("rrlhf-tiny-sft/1").title == "rrlhf-sft v1"


def test_an_unknown_reference_gets_the_close_ones(graph):
    with pytest.raises(ValueError, match="close: rrlhf-policy@candidate"):
        graph.find("rrlhf-policy@candidat")


def test_a_digest_start_that_fits_two_products_is_refused():
    one, two = SFT, version("rrlhf-sft", "2", "sft", "a" * 10 + "b" * 54, {})
    with pytest.raises(ValueError, match="begins several digests"):
        graph_of([two, one]).find("aaaaaa")


def test_an_empty_server_says_so():
    with pytest.raises(ValueError, match="none is registered yet"):
        graph_of([]).find("rrlhf-policy@candidate")


def test_json_holds_the_whole_ancestry_inputs_first(graph, policy):
    told = json.loads(as_json(graph, policy))
    assert [product["digest"][:5] for product in told["products"]] == ["md5:d", "rando", "aaaaa", "bbbbb", "ccccc"]
    links = {(each["from"], each["argument"], each["to"]) for each in told["links"]}
    assert links == {
        (0, "data", 2),
        (1, "base", 2),
        (0, "data", 3),
        (2, "sft", 3),
        (0, "data", 4),
        (2, "sft", 4),
        (3, "reward", 4),
    }
    assert told["products"][told["of"]]["aliases"] == ["rrlhf-policy@candidate"]


HOSTILE = 'a"]; <script>alert(1)</script> #quot; `b` \\ |x| %%'


def hostile():
    tags = {"rrlhf.data": HOSTILE, "rrlhf.node": HOSTILE}
    bad = POLICY._replace(tags=POLICY.tags | tags, aliases=(HOSTILE,))
    graph = graph_of([bad, REWARD, SFT])
    return graph, graph.find("rrlhf-policy/2")


def test_mermaid_is_one_statement_a_line_with_nothing_special_in_labels():
    lines = mermaid(*hostile()).splitlines()
    assert lines[0] == "flowchart LR"
    box = r'n\d+\[\(?"[^"<>\[\]{}|;`\\]*(?:(?:<br/>|#\d+;)[^"<>\[\]{}|;`\\]*)*"\)?\]'
    arrow = r'n\d+ -->\|"[\w-]+"\| n\d+'
    assert all(re.fullmatch(f"    (?:{box}|{arrow}|style n4 stroke-width:3px)", each) for each in lines[1:])
    assert len(lines) == 1 + 5 + 7 + 1


def test_dot_is_one_statement_a_line_with_labels_quoted():
    first, *lines, last = dot(*hostile()).splitlines()
    assert (first, last) == ("digraph {", "}")
    label = r'label="(?:[^"\\]|\\["\\n])*"'
    boxes = [each for each in lines if re.fullmatch(rf"    n\d+ \[{label}\]", each)]
    arrows = [each for each in lines if re.fullmatch(rf"    n\d+ -> n\d+ \[{label}\]", each)]
    assert (len(boxes), len(arrows), len(lines)) == (5, 7, 5 + 7 + 2)


def test_a_page_needs_no_network_and_shows_names_as_text():
    shown = page(*hostile())
    assert not re.search(r"""(?:src|href)="|url\(|@import|https?://""", shown)
    assert "<script" not in shown
    assert "&lt;script&gt;alert" in shown


@st.composite
def links(draw):
    count = draw(st.integers(1, 12))
    pairs = [(a, b) for b in range(count) for a in range(b)]
    return count, draw(st.lists(st.sampled_from(pairs), unique=True)) if pairs else []


@given(links())
def test_up_and_down_are_what_can_be_reached_and_inputs_come_first(drawn):
    count, pairs = drawn
    inputs = {b: {f"from-{a}": f"digest-{a}" for a, c in pairs if c == b} for b in range(count)}
    products = [Product(f"digest-{n}", f"node-{n}", "ppo", f"key-{n}", inputs[n]) for n in range(count)]
    graph = Graph(products)

    def reached(start, forward):
        found, waiting = {start}, [start]
        while waiting:
            n = waiting.pop()
            new = {b if forward else a for a, b in pairs if (a if forward else b) == n} - found
            found |= new
            waiting += new
        return found

    for n, product in enumerate(products):
        for walk, forward in ((graph.up, False), (graph.down, True)):
            order = [int(each.digest.partition("-")[2]) for each in walk(product)]
            assert set(order) == reached(n, forward)
            assert len(order) == len(set(order))
            assert all(order.index(a) < order.index(b) for a, b in pairs if a in order and b in order)


def test_a_chain_of_thousands_is_no_trouble():
    products = [Product(f"d{n}", f"n{n}", "ppo", f"k{n}", {"before": f"d{n - 1}"} if n else {}) for n in range(5000)]
    graph = Graph(products)
    assert len(graph.up(products[-1])) == len(graph.down(products[0])) == 5000
    assert len(tree(graph, products[-1]).splitlines()) == 5000


def test_lineage_starts_without_the_heavy_libraries():
    heavy = {"torch", "transformers", "mlflow"}
    code = f"import sys, rrlhf.tools.lineage, rrlhf.cli; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_row_of_the_source_is_looked_up_without_its_further_columns():
    row = {"prompt": "Ice?", "chosen": "Yes.", "rejected": "No."}
    assert digest_start(json.dumps(row | {"score_chosen": 4, "difficulty": "easy"})) == digest_start(json.dumps(row))
