"""docs/data.md: its rows are read as it says, and it names every rule, format, kind of file and setting."""

import json
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from preferences import load_preferences

from rrlhf.config import Prepare
from rrlhf.data.files import BINARY, COMPRESSED, TEXT
from rrlhf.data.rows import FIXES, NOT_READ, NOT_READ_IN_A_TURN
from rrlhf.judging.labelled import PAIR_FORMATS, load_pairs

ROOT = Path(__file__).parents[2]
TEXT_OF_PAGE = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\S+) ([^\n]+)\n(.*?)^```$", TEXT_OF_PAGE, re.MULTILINE | re.DOTALL)


def shown():
    """What the page shows: (kind, format, content, what is read of it) and (kind, format, content, rule)."""
    read, refused, waiting = [], [], []
    for kind, what, content in BLOCKS:
        name, _, rule = what.partition(" ")
        if what == "read":
            rows = [json.loads(line) for line in content.splitlines()]
            read += [(*block, rows) for block in waiting]
            waiting = []
        elif rule:
            refused.append((kind, name, content, rule))
        elif kind == "jsonl":
            waiting += [(kind, name, f"{line}\n") for line in content.splitlines()]
        elif kind != "python":
            waiting.append((kind, name, content))
    assert not waiting
    return read, refused


READ, REFUSED = shown()


def as_shown(path, format):
    """Return what is read of a file in the way the page shows it."""
    if format == "rewardbench":
        found = load_pairs(path, format, max_rejected=0.0, limit=None)
        subsets = [found.subsets[question] for question in found.questions]
        return [pair._asdict() | {"subset": subset} for pair, subset in zip(found.pairs, subsets, strict=True)]
    loaded = load_preferences(str(path), format=format, max_rejected=0.0, limit=None)
    rows = zip(loaded.preferences, loaded.columns, strict=True)
    return [pair._asdict() | ({"columns": columns} if columns else {}) for pair, columns in rows]


@pytest.mark.parametrize(("kind", "format", "content", "expected"), READ)
def test_a_row_of_the_page_is_read_as_it_says(tmp_path, kind, format, content, expected):
    path = tmp_path / f"rows.{kind}"
    path.write_text(content)
    assert as_shown(path, format) == expected


@pytest.mark.parametrize(("kind", "format", "content", "rule"), REFUSED)
def test_a_row_that_the_page_calls_refused_is_refused_by_that_rule(tmp_path, kind, format, content, rule):
    path = tmp_path / f"rows.{kind}"
    path.write_text(next(good for _, name, good, _ in READ if name == format) + content)
    (refused,) = load_preferences(str(path), format=format, max_rejected=0.5, limit=None).rejected
    assert (refused.line, refused.rule) == (2, rule)


def test_the_files_that_the_page_writes_are_read_as_it_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"pa": pa, "pq": pq}
    expected = next(rows for kind, _, _, rows in READ if kind == "csv")
    written = [(name, content) for kind, name, content in BLOCKS if kind == "python"]
    for name, content in written:
        exec(content, names)
        assert as_shown(tmp_path / name, "rows") == expected
    assert {Path(name).suffix for name, _ in written} == set(BINARY)


def test_every_format_and_every_kind_of_file_has_a_row():
    assert {format for _, format, _, _ in READ} == set(PAIR_FORMATS)
    assert {f".{kind}" for kind, _, _, _ in READ} == set(TEXT)
    assert all(f"`.{kind}{packed}`" in TEXT_OF_PAGE for kind, packed in zip(("jsonl", "csv"), COMPRESSED, strict=True))


def test_every_rule_stands_there_with_its_fix_and_no_other():
    table = TEXT_OF_PAGE.split("| rule |")[1].split("\n\n")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    assert {row[0].strip("`"): row[2] for row in rows} == FIXES
    assert [row[0].strip("`") for row in rows] == [*FIXES]


def test_every_setting_and_every_column_that_is_not_read_is_named():
    named = set(re.findall(r"`prepare\.(\w+)`", TEXT_OF_PAGE))
    assert (
        {"source", "format", "revision", "config", "split", "limit", "max_rejected"}
        <= named
        <= set(Prepare.model_fields)
    )
    assert {*NOT_READ, *NOT_READ_IN_A_TURN} <= set(re.findall(r"`(\w+)`", TEXT_OF_PAGE))


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\((?!https?:|#)([^)#]+)", TEXT_OF_PAGE))))
def test_every_link_leads_to_a_file(link):
    assert (ROOT / "docs" / link).exists()
