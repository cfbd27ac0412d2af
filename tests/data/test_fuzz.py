"""Whatever a file or a row holds, a reader gives rows, rejects by a rule, or refuses the file by name; nothing else."""

import csv
import gzip
import io
import json
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from preferences import load_preferences

from rrlhf.data.rows import FIXES, FORMATS, RowError

ROWS = [
    {"prompt": f"Question {i}?", "chosen": f"yes {i}", "rejected": "no", "score_chosen": 2.5, "score_rejected": 1.0}
    for i in range(3)
]


def _cells():
    file = io.StringIO()
    writer = csv.DictWriter(file, ROWS[0])
    writer.writeheader()
    writer.writerows(ROWS)
    return file.getvalue().encode()


def _arrow(write):
    table, sink = pa.Table.from_pylist(ROWS), pa.BufferOutputStream()
    write(table, sink)
    return sink.getvalue().to_pybytes()


def _ipc(table, sink):
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)


LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
FILES = {
    "rows.jsonl": LINES,
    "rows.json": json.dumps(ROWS).encode(),
    "rows.csv": _cells(),
    "rows.jsonl.gz": gzip.compress(LINES),
    "rows.parquet": _arrow(pq.write_table),
    "rows.arrow": _arrow(_ipc),
}
EDIT = st.tuples(st.floats(0, 1), st.integers(0, 9), st.binary(max_size=9))  # where, bytes taken out, bytes put in


def edited(content, edits):
    for where, out, put in edits:
        start = round(where * len(content))
        content = content[:start] + put + content[start + out :]
    return content


def holds(name, format, content):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, name)
        path.write_bytes(content)
        refused, rejected = None, []
        try:
            rejected = load_preferences(str(path), format=format, max_rejected=1.0, limit=None).rejected
        except ValueError as error:
            refused = error
        assert refused is None or type(refused) is ValueError
        assert refused is None or str(refused).startswith(str(path))
        assert all(row.rule in FIXES and row.detail.isprintable() for row in rejected)


CHANGED = {
    "name": st.sampled_from([*FILES]),
    "format": st.sampled_from([*FORMATS]),
    "edits": st.lists(EDIT, max_size=4),
}


@settings(max_examples=300)
@given(**CHANGED)
@example(name="rows.arrow", format="hh", edits=[(0.8984375, 7, b"\0\0\0\0\0\0\x80")])  # a column's name
def test_a_file_with_any_bytes_is_read_or_refused_by_name(name, format, edits):
    holds(name, format, edited(FILES[name], edits))


@pytest.mark.slow  # as above, at length
@pytest.mark.timeout(1200)
@settings(max_examples=20_000)
@given(**CHANGED)
def test_of_many_files_with_any_bytes_each_is_read_or_refused_by_name(name, format, edits):
    holds(name, format, edited(FILES[name], edits))


TEXT = st.text(st.characters(exclude_categories=[]), max_size=9)  # lone surrogates, NUL and all
VALUE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["role", "content", "from", "value", "type", "text"]) | TEXT, inner, max_size=4
        )
    ),
    max_leaves=9,
)
ROLE = st.sampled_from(["user", "assistant", "system", "human", "gpt"])
TURN = st.fixed_dictionaries({"role": ROLE | TEXT, "content": TEXT | VALUE})
COLUMN = st.sampled_from(
    ["prompt", "chosen", "rejected", "conversations", "system", "score_chosen", "score_rejected", "tools"]
)
HH = st.lists(st.sampled_from(["\n\nHuman:", "\n\nAssistant:", " a", "\n"]) | TEXT, max_size=6).map("".join)


@settings(max_examples=200)
@given(
    format=st.sampled_from([*FORMATS]),
    row=st.dictionaries(COLUMN | TEXT, VALUE | HH | st.lists(TURN, max_size=4), max_size=6),
)
def test_any_row_is_read_or_rejected_by_a_rule_that_quotes_it_with_escapes(format, row):
    rejected = None
    try:
        json.dumps(FORMATS[format].read(row), ensure_ascii=False).encode()
    except RowError as error:
        rejected = error
    assert rejected is None or (rejected.rule in FIXES and rejected.detail.isprintable())
