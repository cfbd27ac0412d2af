"""Rows by their content: order never matters, contents always do."""

import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rrlhf.data.fingerprints import (
    FILE,
    Changed,
    fingerprint,
    hashes,
    row_changes,
    row_hash,
    tables_with,
    write_hashes,
)
from rrlhf.data.tables import write_tables

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
messages = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": texts}), max_size=3
)
rows = st.fixed_dictionaries({"prompt": messages, "chosen": texts, "rejected": texts})


def pair(prompt, chosen, rejected, flipped=None):
    return {"prompt": [{"role": "user", "content": prompt}], "chosen": chosen, "rejected": rejected, "flipped": flipped}


def data_set(folder, preferences, with_hashes=True):
    """Write a table of preferences as a prepared data set would hold it; return its files by name."""
    folder.mkdir()
    write_tables(folder, (("preferences", each) for each in preferences))
    if with_hashes:
        write_hashes(folder, {"preferences": map(row_hash, preferences)})
    return {path.name: path for path in folder.iterdir()}


OLD = [pair("Ice?", "Yes.", "No."), pair("Fog?", "So.", "Hm."), pair("Sun?", "Ah.", "Oh."), pair("Sea?", "Up.", "By.")]
NEW = [
    pair("Sun?", "Ah.", "Oh."),  # as before
    pair("Ice?", "No.", "Yes."),  # the label turned
    pair("fog?", "So.", "Er."),  # another rejected response, to what counts as the same prompt
    pair("Sky?", "Blue.", "Red."),  # new; the one about the sea is gone
]


@given(st.lists(rows, max_size=6), st.randoms())
def test_a_fingerprint_does_not_depend_on_order(some, draw):
    mixed = list(some)
    draw.shuffle(mixed)
    assert fingerprint(map(row_hash, mixed)) == fingerprint(map(row_hash, some))


@given(st.lists(rows, max_size=6), rows)
def test_one_row_more_is_another_fingerprint_also_when_it_is_a_repetition(some, one):
    before = fingerprint(map(row_hash, some))
    assert len({before, fingerprint(map(row_hash, [*some, one])), fingerprint(map(row_hash, [*some, one, one]))}) == 3


@given(rows, rows)
def test_equal_hashes_mean_equal_rows(one, other):
    assert (row_hash(one) == row_hash(other)) == (one == other)


def test_fields_have_no_order_and_only_content_counts():
    row = pair("Ice?", "Yes.", "No.", flipped=True)
    assert row_hash(row) == row_hash(dict(reversed(row.items()))) == row_hash(pair("Ice?", "Yes.", "No."))
    assert row_hash({"prompt": row["prompt"], "topic": None}) == row_hash({"prompt": row["prompt"]})


def test_a_composed_letter_is_not_the_decomposed_one():
    assert row_hash(pair("\u00e9", "a", "b")) != row_hash(pair("e\u0301", "a", "b"))


def test_a_known_row_has_a_known_hash():
    import hashlib

    text = '{"chosen":"Yes.","prompt":[{"content":"Ice?","role":"user"}],"rejected":"No."}'
    assert row_hash(pair("Ice?", "Yes.", "No.")) == hashlib.sha256(text.encode()).hexdigest()


@pytest.mark.parametrize("with_hashes", [True, False])
def test_added_removed_and_changed_rows_are_listed(tmp_path, with_hashes):
    old, new = data_set(tmp_path / "old", OLD, with_hashes), data_set(tmp_path / "new", NEW, with_hashes)
    found = row_changes(old, new)["preferences"]
    digests = {row["prompt"][0]["content"]: row_hash(row) for row in OLD}
    after = [row_hash(row) for row in NEW]
    assert found.added == [after[3]]
    assert found.removed == [digests["Sea?"]]
    assert set(found.changed) == {
        Changed(digests["Ice?"], after[1], "label turned"),
        Changed(digests["Fog?"], after[2], "prompt, rejected"),
    }
    assert found.kept == 1


def test_a_row_that_is_there_twice_counts_twice(tmp_path):
    old, new = data_set(tmp_path / "old", [OLD[0]]), data_set(tmp_path / "new", [OLD[0], OLD[0]])
    assert row_changes(old, new)["preferences"]._replace(kept=0) == ([row_hash(OLD[0])], [], [], 0)


def test_of_many_answers_to_one_prompt_the_most_alike_are_paired(tmp_path):
    old = [pair("Ice?", "a", "b"), pair("Ice?", "c", "d"), pair("Ice?", "e", "f")]
    new = [pair("Ice?", "x", "y"), pair("Ice?", "c", "z"), pair("Ice?", "b", "a")]
    found = row_changes(data_set(tmp_path / "old", old), data_set(tmp_path / "new", new))["preferences"]
    assert {change.what for change in found.changed} == {"label turned", "rejected", "chosen, rejected"}
    assert (row_hash(old[1]), row_hash(new[1]), "rejected") in found.changed


@pytest.mark.parametrize("with_hashes", [True, False])
def test_a_row_is_found_by_the_start_of_its_hash(tmp_path, with_hashes):
    many = [pair(f"Question {n}?", "Yes.", "No.") for n in range(100)]
    files = data_set(tmp_path / "data", many, with_hashes)
    wanted = row_hash(many[17])
    assert tables_with(wanted, files) == {wanted: {"preferences"}}
    for start in (wanted[:7], wanted[0]):
        assert set(tables_with(start, files)) == {row_hash(row) for row in many if row_hash(row).startswith(start)}
    assert tables_with("0" * 64, files) == {}


def test_stored_hashes_are_those_of_the_tables(tmp_path):
    draw = random.Random(0)
    many = [pair(draw.choice("abc"), draw.choice("de"), draw.choice("fg")) for _ in range(50)]
    files = data_set(tmp_path / "data", many)
    without: dict[str, Path] = {name: path for name, path in files.items() if name != FILE}
    assert sorted(hashes(files)["preferences"]) == sorted(hashes(without)["preferences"])
