"""What differs between two products, and where it begins; products are written by hand."""

from pathlib import Path

from rrlhf.data.fingerprints import Changed, RowChanges
from rrlhf.pipeline.ancestry import Graph, Product
from rrlhf.pipeline.store import Store
from rrlhf.tools.lineage.diff import as_json, as_text, compared

CODE = {"run": "1", "encode": "2"}


def product(node, digest, inputs, params, code=CODE, numbers=None, known=True):
    document = {"stage": node.partition("-")[0], "params": params, "inputs": inputs, "code": code, "numerics": {}}
    stage = "prepare" if node == "data" else document["stage"]
    return Product(
        digest, node, stage, f"key of {digest}", inputs, document=document if known else None, metrics=numbers or {}
    )


def between(old, new):
    """Compare the last products of two families; both have one data set, or none that is here."""
    return compared(Graph([*old, *new]), old[-1], new[-1], Store(Path("nowhere")))


def family(mark, limit=100, lr=0.1, code=CODE, known=True, result=""):
    data = product("data", f"data{limit}", {"source": "written"}, {"prepare": {"limit": limit}}, known=known)
    sft = product("sft", f"sft{mark}{result}", {"data": data.digest}, {"sft": {"lr": lr}}, code)
    ppo = product(
        "ppo-a", f"ppo{mark}{result}", {"data": data.digest, "sft": sft.digest}, {"ppo": {}}, numbers={"kl": 1}
    )
    return [data, sft, ppo]


def test_a_changed_setting_is_named_and_what_follows_from_it_is_not_blamed():
    found = between(family(1), family(2, lr=0.2))
    assert found.first.name == "sft"
    assert [(node.name, node.same, node.reasons) for node in found.nodes] == [
        ("data", True, []),
        ("sft", False, ["sft.lr 0.1 -> 0.2"]),
        ("ppo-a", False, []),
    ]
    assert "first difference: sft (sft.lr 0.1 -> 0.2)" in as_text(found)
    assert as_json(found)["nodes"][1]["changes"] == [{"name": "params.sft.lr", "old": 0.1, "new": 0.2}]


def test_the_first_of_several_differences_is_the_one_furthest_up():
    assert between(family(1), family(2, limit=50, lr=0.2)).first.name == "data"


def test_changed_code_is_named_by_what_it_defines():
    assert "code: encode changed" in as_text(between(family(1), family(2, code=CODE | {"encode": "9"})))


def test_equal_settings_with_another_result_are_told():
    found = between(family(1), family(1, result="!"))
    assert found.first.name == "sft"
    assert "the same settings, code and inputs, and another result" in as_text(found)


def test_settings_that_were_not_kept_are_told_as_unknown():
    found = between(family(1, known=False), family(2, limit=50))
    assert (found.first.name, found.first.reasons) == ("data", ["unknown: its settings were not kept"])


def test_the_same_product_has_no_difference():
    mine = family(1)
    found = between(mine, mine)
    assert found.first is None
    assert as_text(found).endswith("the same content, made in the same way")


def test_rows_and_numbers_are_listed():
    rows = {"preferences": RowChanges(["a" * 64], [], [Changed("b" * 64, "c" * 64, "label turned")] * 7, 3)}
    found = between(family(1), family(2, lr=0.2))._replace(rows=rows, metrics={"kl": (1.0, 2.5), "same": (1.0, 1.0)})
    text = as_text(found)
    assert "preferences  1 added, 0 removed, 7 changed, 3 kept" in text
    assert "  and 2 more; --json lists all" in text
    assert "same" not in text.partition("metrics")[2]
    assert as_json(found)["rows"]["preferences"]["changed"][0]["what"] == "label turned"
