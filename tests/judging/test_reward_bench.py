import csv
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from rrlhf.data.rows import FIXES
from rrlhf.judging.calibration import correct
from rrlhf.judging.labelled import accuracy_by_subset, load_pairs, prompt_numbers, question_wins

ROWS = [
    {"prompt": f"Question {n // 2}", "chosen": f"yes {n}", "rejected": f"no {n}", "subset": "ab"[n % 2]}
    for n in range(6)
]


def write(path, rows):
    if path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def read(path, format="rewardbench", **changes):
    return load_pairs(path, format, **({"max_rejected": 0.0, "limit": None} | changes))


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet"])
def test_every_kind_of_file_gives_the_same_pairs(tmp_path, name):
    found = read(write(tmp_path / name, ROWS))
    assert [pair.chosen for pair in found.pairs] == [row["chosen"] for row in ROWS]
    assert found.subsets == list("ababab")
    assert prompt_numbers(found.pairs).tolist() == [0, 0, 1, 1, 2, 2]
    assert len(read(tmp_path / name, limit=2).pairs) == 2


def test_all_mistakes_are_told_at_once_with_file_line_and_rule(tmp_path):
    bad = [*ROWS, ROWS[0] | {"chosen": ""}, ROWS[1] | {"chosen": "no 1"}, ROWS[2] | {"subset": 3}, ROWS[3]]
    path = write(tmp_path / "a.jsonl", bad)
    with pytest.raises(ValueError, match="4 of 10 rows are bad") as caught:
        read(path)
    said = str(caught.value)
    for line, rule in ((7, "empty"), (8, "chosen_equals_rejected"), (9, "wrong_type"), (10, "duplicate")):
        assert f"{path}:{line}: {rule}: " in said
        assert f" 1 {rule}: {FIXES[rule]}" in said
    tolerant = read(path, max_rejected=0.5)
    assert len(tolerant.pairs) == 6
    assert [row.line for row in tolerant.rejected] == [7, 8, 9, 10]


def test_one_pair_may_stand_in_two_subsets(tmp_path):
    assert len(read(write(tmp_path / "a.jsonl", [ROWS[0], ROWS[0] | {"subset": "b"}])).pairs) == 2


def test_wrong_columns_are_named_once_with_the_close_ones(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"prompt": "q", "chosen": "a", "reject": "b"}])
    with pytest.raises(ValueError, match="no column 'rejected' \\(did you mean 'reject'\\?\\), 'subset'"):
        read(path)


def test_missing_and_empty_files_and_unknown_formats_are_refused(tmp_path):
    empty = tmp_path / "a.jsonl"
    empty.write_text("")
    with pytest.raises(ValueError, match="empty"):
        read(empty)
    with pytest.raises(ValueError, match="no such file"):
        read(tmp_path / "b.jsonl")
    with pytest.raises(ValueError, match="did you mean rewardbench"):
        read(empty, "rewardbenhc")


def test_rewardbench_2_pairs_every_chosen_with_every_rejected_response_of_a_question(tmp_path):
    rows = [
        {"prompt": "q", "chosen": ["yes"], "rejected": ["no", "never", "nay"], "subset": "a", "num_correct": 1},
        {"prompt": "r", "chosen": ["red", "blue"], "rejected": ["seven", "eight"], "subset": "Ties", "id": "tied:0"},
        {"prompt": "s", "chosen": "yes", "rejected": "no", "subset": "a"},
        {"prompt": "t", "chosen": ["yes"], "rejected": [], "subset": "a"},
        {"prompt": "q", "chosen": ["yes"], "rejected": ["no", "never", "nay"], "subset": "a"},
        {"prompt": "u", "chosen": ["yes", None], "rejected": ["no"], "subset": "a"},
        {"prompt": "v", "chosen": ["yes"], "rejected": ["no", "yes "], "subset": "a"},
    ]
    for name in ("a.jsonl", "a.json"):
        found = read(write(tmp_path / name, rows), max_rejected=0.6)
        assert [pair.rejected for pair in found.pairs] == ["no", "never", "nay", *["seven", "eight"] * 2, "no"]
        assert [pair.chosen for pair in found.pairs][3:7] == ["red", "red", "blue", "blue"]
        assert (found.questions, found.subsets) == ([0, 0, 0, 1, 1, 1, 1, 2], ["a", "Ties", "a"])
        assert [row.rule for row in found.rejected] == ["empty", "duplicate", "wrong_type", "chosen_equals_rejected"]
    pq.write_table(pa.Table.from_pylist(rows[:2]), tmp_path / "a.parquet")
    assert len(read(tmp_path / "a.parquet", limit=1).pairs) == 3
    with pytest.raises(ValueError, match="turn 1 of chosen is str"):
        read(write(tmp_path / "a.jsonl", [{**rows[0], "subset": None}]), "rows")


@pytest.mark.parametrize(
    ("margins", "wins"),
    [
        ([1.0, 0.5, 2.0], 1.0),
        ([1.0, 0.0, 2.0], 1 / 2),  # two score highest, of which one is picked
        ([0.0, 0.0, 0.0], 1 / 4),
        ([1.0, 0.0, -0.1], 0.0),
    ],
)
def test_a_question_is_right_when_nothing_rejected_is_picked(margins, wins):
    found = question_wins(torch.tensor([0.3, *margins, -1.0]), [0, 1, 1, 1, 2])
    assert found.tolist() == [1.0, pytest.approx(wins), 0.0]


def test_a_question_with_one_pair_counts_as_the_pair_does():
    margins = torch.tensor([0.2, 0.0, -0.2])
    assert question_wins(margins, [0, 1, 2]).equal(correct(margins))


def test_macro_counts_subsets_and_micro_counts_prompts():
    wins = torch.tensor([1.0, 1.0, 1.0, 0.0])
    found = accuracy_by_subset(wins, ["easy", "easy", "easy", "hard"], torch.arange(4))
    assert {name: part.mean for name, part in found.subsets.items()} == {"easy": 1, "hard": 0}
    assert (found.macro.mean, found.micro.mean) == (0.5, 0.75)
    assert found.subsets["easy"].low == pytest.approx(0.43850, abs=1e-5)  # Wilson: 1 / (1 + 1.96^2 / 3)
