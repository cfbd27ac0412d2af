import csv
import gzip
import json
import subprocess
import sys
import tempfile
import unicodedata
from collections import Counter
from hashlib import sha256
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from preferences import Loaded, load_preferences

from rrlhf.data.load import prompt_hash, split_by_prompt
from rrlhf.data.rows import FIXES, MAX_CHARACTERS
from rrlhf.types import Message, Preference

SHARES = {"sft": 0.15, "preferences": 0.45, "heldout": 0.1, "ppo": 0.15, "evaluate": 0.15}


def user(text: str) -> Message:
    return Message(role="user", content=text)


def assistant(text: str) -> Message:
    return Message(role="assistant", content=text)


def plain(prompt: object = "Hi?", chosen: object = "Hello.", rejected: object = "Go away.") -> dict[str, object]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def hh(chosen: str = "A: Hello.", rejected: str = "A: Go away.", before: str = "H: Hi?") -> dict[str, object]:
    """Spell dialogues out of turns divided by ' / '."""
    return {"chosen": _spelled(f"{before} / {chosen}"), "rejected": _spelled(f"{before} / {rejected}")}


def _spelled(turns: str) -> str:
    speakers = {"H": "Human", "A": "Assistant"}
    return "".join(f"\n\n{speakers[turn[0]]}{turn[1:]}" for turn in turns.split(" / "))


def ultra(prompt: object = "Hi?", **changes: object) -> dict[str, object]:
    row: dict[str, object] = {"prompt": prompt, "score_chosen": 8.5, "score_rejected": 3}
    row |= {"chosen": [user("Hi?"), assistant("Hello.")], "rejected": [user("Hi?"), assistant("Go away.")]}
    return row | changes


def sharegpt(*turns: str) -> list[dict[str, str]]:
    """Spell turns as ShareGPT does, human and gpt by turns."""
    return [{"from": ("human", "gpt")[i % 2], "value": turn} for i, turn in enumerate(turns)]


def as_line(row: object) -> bytes:
    return row if isinstance(row, bytes) else json.dumps(row).encode()


def jsonl(folder: Path, *rows: object) -> Path:
    path = folder / "rows.jsonl"
    path.write_bytes(b"".join(as_line(row) + b"\n" for row in rows))
    return path


def load(source: Path | str, format: str = "rows", max_rejected: float = 0.99, limit: int | None = None) -> Loaded:
    return load_preferences(str(source), format=format, max_rejected=max_rejected, limit=limit)


def refusal(source: Path | str, format: str = "rows", max_rejected: float = 0.99) -> str:
    with pytest.raises(ValueError) as error:  # noqa: PT011 the caller looks at the message
        load(source, format, max_rejected)
    return str(error.value)


GOOD = {"rows": plain("Good?"), "hh": hh(before="H: Good?")} | {
    "ultrafeedback": ultra("G?", chosen=[user("G?"), assistant("y")], rejected=[user("G?"), assistant("n")])
}

LATIN1 = '{"prompt": "Café?", "chosen": "a", "rejected": "b"}'.encode("latin-1")

BAD = [
    ("not_utf8", "rows", LATIN1),
    ("not_utf8", "rows", json.dumps(plain()).encode("utf-16")),
    ("bad_json", "rows", b'{"prompt": "Hi?", "chosen"'),
    ("bad_json", "rows", b'{"a": ' * 100_000),
    ("bad_json", "rows", b'{"prompt": ' + b"9" * 5000 + b"}"),
    ("not_an_object", "rows", ["Hi?", "a", "b"]),
    ("not_an_object", "rows", None),
    ("missing_field", "rows", {"prompt": "Hi?", "chosen": "a"}),
    ("missing_field", "rows", plain([{"role": "user"}])),
    ("missing_field", "ultrafeedback", {k: v for k, v in ultra().items() if k != "score_chosen"}),
    ("no_prompt", "rows", {"chosen": "a", "rejected": "b"}),
    ("no_prompt", "rows", plain(None, [assistant("a")], [assistant("b")])),
    ("wrong_type", "rows", plain(chosen=None)),
    ("wrong_type", "rows", plain(chosen=["Hello."])),
    ("wrong_type", "rows", plain([user("Hi?") | {"content": ["Hi?"]}])),
    ("wrong_type", "rows", plain([user("Hi?") | {"content": [{"type": "text", "text": 3}]}])),
    ("wrong_type", "rows", plain() | {"score_chosen": 3, "score_rejected": None}),
    ("missing_field", "rows", plain() | {"score_chosen": 3}),
    ("missing_field", "rows", plain([{"from": "human"}])),
    ("missing_field", "rows", plain([user("Hi?") | {"content": [{"type": "text"}]}])),
    ("not_text", "rows", plain([user("Hi?") | {"content": [{"type": "image"}, {"type": "text", "text": "Hi?"}]}])),
    ("not_text", "rows", plain(chosen=[assistant("Hello.") | {"tool_calls": [{"name": "f"}]}])),
    ("not_text", "rows", plain() | {"images": ["cat.png"]}),
    ("not_text", "rows", plain() | {"tools": '[{"name": "f"}]'}),
    ("not_one_response", "rows", plain(chosen=[assistant("Hello."), user("Hi?"), assistant("Hello.")])),
    ("wrong_type", "rows", plain(chosen=float("nan"))),
    ("wrong_type", "rows", plain(chosen=3)),
    ("wrong_type", "rows", plain(prompt={"role": "user", "content": "Hi?"})),
    ("wrong_type", "rows", plain(prompt=["Hi?"])),
    ("wrong_type", "ultrafeedback", ultra(chosen=3)),
    ("wrong_type", "ultrafeedback", ultra(score_chosen=None)),
    ("wrong_type", "ultrafeedback", ultra(score_chosen="8")),
    ("wrong_type", "ultrafeedback", ultra(score_chosen=True)),
    ("empty", "rows", plain(chosen="")),
    ("empty", "rows", plain(prompt=" \n\t\u3000")),
    ("empty", "rows", plain(rejected="\u200b\ufeff")),
    ("empty", "rows", plain(prompt=[])),
    ("empty", "hh", hh("A: ")),
    ("empty", "hh", hh(before="H:  / A: Yes? / H: Hi?")),
    ("empty", "ultrafeedback", ultra(rejected=[user("Hi?"), assistant(" ")])),
    ("too_long", "rows", plain(chosen="x" * (MAX_CHARACTERS + 1))),
    ("too_long", "rows", plain([user("x" * MAX_CHARACTERS), assistant("y"), user("z")])),
    ("control_characters", "rows", plain(chosen="a\0b")),
    ("control_characters", "rows", plain(chosen="a\ud800b")),
    ("control_characters", "hh", hh("A: \udfff")),
    ("role_order", "rows", plain([assistant("Hi?")])),
    ("role_order", "rows", plain([user("Hi?"), assistant("Yes?")])),
    ("role_order", "rows", plain([Message(role="human", content="Hi?")])),
    ("role_order", "rows", plain([Message(role="system", content="Be kind.")])),
    ("role_order", "rows", {"conversations": sharegpt("Hi?", "Yes?"), "chosen": "a", "rejected": "b"}),
    ("role_order", "rows", {"conversations": [{"from": "tool", "value": "Hi?"}], "chosen": "a", "rejected": "b"}),
    ("role_order", "hh", hh(before="A: Hi?")),
    ("role_order", "hh", hh(before="H: Hi? / A: Hm.")),
    ("role_order", "hh", {"chosen": "Hello.", "rejected": "Go away."}),
    ("role_order", "hh", {"chosen": "Note: " + _spelled("H: a / A: b"), "rejected": _spelled("H: a / A: c")}),
    ("no_final_assistant_turn", "hh", hh("A: Hello. / H: Bye.")),
    ("no_final_assistant_turn", "ultrafeedback", ultra(chosen=[user("Hi?")])),
    ("prompts_differ", "hh", {"chosen": _spelled("H: Hi? / A: a"), "rejected": _spelled("H: Ho? / A: b")}),
    ("prompts_differ", "hh", hh("A: Hello. / H: Bye. / A: Bye.", "A: Hello.")),
    ("prompts_differ", "hh", hh("A: Hello.", "A: Go away. / H: Bye. / A: Bye.")),
    ("prompts_differ", "ultrafeedback", ultra(prompt="Something else?")),
    ("prompts_differ", "ultrafeedback", ultra(chosen="Hello.")),
    ("prompts_differ", "rows", plain("Ho?", [user("Hi?"), assistant("a")], [user("Hi?"), assistant("b")])),
    ("prompts_differ", "rows", plain([user("Ho?")], [user("Hi?"), assistant("a")], [user("Hi?"), assistant("b")])),
    ("prompts_differ", "rows", plain("Ho?") | {"conversations": sharegpt("Hi?")}),
    (
        "prompts_differ",
        "rows",
        plain([Message(role="system", content="Be kind."), user("Hi?")]) | {"system": "Be odd."},
    ),
    ("score_contradicts_label", "ultrafeedback", ultra(score_chosen=2.0)),
    ("score_contradicts_label", "rows", plain() | {"score_chosen": -1, "score_rejected": 0}),
    ("score_tie", "ultrafeedback", ultra(score_chosen=3.0)),
    ("score_tie", "rows", plain() | {"score_chosen": 0, "score_rejected": 0.0}),
    ("score_not_finite", "ultrafeedback", ultra(score_chosen=float("nan"))),
    ("score_not_finite", "ultrafeedback", ultra(score_rejected=float("-inf"))),
    ("score_not_finite", "ultrafeedback", ultra(score_rejected=10**400)),
    ("chosen_equals_rejected", "rows", plain(rejected=" Hello.\n")),
    ("chosen_equals_rejected", "hh", hh("A: Go away.")),
    ("duplicate", "rows", plain(" GOOD? ", "hello.", "Go  away.")),
    ("conflicting_label", "rows", plain("good?", "Go away.", "Hello.")),
]


@pytest.mark.parametrize(("rule", "format", "row"), BAD, ids=[f"{rule}-{i}" for i, (rule, _, _) in enumerate(BAD)])
def test_a_bad_row_is_rejected_by_its_rule_and_line(tmp_path: Path, rule: str, format: str, row: object):
    path = jsonl(tmp_path, GOOD[format], b"", row)
    loaded = load(path, format)
    assert len(loaded.preferences) == 1
    assert [rejected[:3] for rejected in loaded.rejected] == [(str(path), 3, rule)]
    assert loaded.rejected[0].detail.isprintable()


def test_every_rule_is_provoked_above_or_by_the_csv_test():
    assert {rule for rule, _, _ in BAD} | {"bad_csv", "refused_by_template", "no_room"} == set(FIXES)


def test_plain_rows_keep_their_texts_as_they_are(tmp_path: Path):
    dialogue = [Message(role="system", content="Be kind."), user("Hi"), assistant("Yes?"), user(" Who? ")]
    rows = [plain(" a\x1b[0m ", "<|im_end|>", "é\u200d"), plain(dialogue, "b " * 10, "x" * MAX_CHARACTERS)]
    loaded = load(jsonl(tmp_path, *rows), max_rejected=0)
    assert loaded.preferences[0] == Preference([user(" a\x1b[0m ")], "<|im_end|>", "é\u200d")
    assert loaded.preferences[1].prompt == dialogue


SYSTEM = Message(role="system", content="Be kind.")
DIALOGUE = [user("Hi?"), assistant("Yes?"), user("Who?")]
ASKED = [
    plain(DIALOGUE, "me", "you"),
    plain(DIALOGUE, [assistant("me")], [assistant("you")]),
    plain(None, [*DIALOGUE, assistant("me")], [*DIALOGUE, assistant("you")]),
    plain("Who?", [*DIALOGUE, assistant("me")], [*DIALOGUE, assistant("you")]),
    plain(DIALOGUE, [*DIALOGUE, assistant("me")], [*DIALOGUE, assistant("you")]),
    {"conversations": sharegpt("Hi?", "Yes?", "Who?"), "chosen": "me", "rejected": "you"},
    {"conversations": sharegpt("Hi?", "Yes?", "Who?"), "chosen": {"from": "gpt", "value": "me"}}
    | {"rejected": {"from": "gpt", "value": "you"}, "system": "", "tools": "", "images": []},
    {"chosen": sharegpt("Hi?", "Yes?", "Who?", "me"), "rejected": sharegpt("Hi?", "Yes?", "Who?", "you")},
    plain([{"role": turn["role"], "content": [{"type": "text", "text": turn["content"]}]} for turn in DIALOGUE])
    | {
        "chosen": [{"role": "assistant", "content": [{"type": "text", "text": part} for part in "me"]}],
        "rejected": "you",
    },
]


@pytest.mark.parametrize("row", ASKED)
def test_one_dialogue_is_read_alike_however_it_is_laid_out(tmp_path: Path, row: dict[str, object]):
    rows = [row, row | {"system": "Be kind."}, row | {"score_chosen": 2, "score_rejected": 1, "chosen": row["chosen"]}]
    loaded = load(jsonl(tmp_path, *rows))
    assert loaded.preferences == [
        Preference(DIALOGUE, "me", "you"),
        Preference([SYSTEM, *DIALOGUE], "me", "you"),
    ]
    assert [(bad.line, bad.rule) for bad in loaded.rejected] == [(3, "duplicate")]


@pytest.mark.parametrize("row", ASKED)
def test_arrow_tables_and_json_give_the_same_row(tmp_path: Path, row: dict[str, object]):
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "rows.parquet")
    assert load(tmp_path / "rows.parquet", max_rejected=0).preferences == [Preference(DIALOGUE, "me", "you")]


def test_a_system_turn_may_stand_twice_if_it_says_the_same(tmp_path: Path):
    row = plain([SYSTEM, user("Hi?")]) | {"system": "Be kind."}
    assert load(jsonl(tmp_path, row), max_rejected=0).preferences[0].prompt == [SYSTEM, user("Hi?")]


def test_columns_beside_those_of_the_format_are_kept_by_name(tmp_path: Path):
    rows = [
        plain("a") | {"answer": "4", "n": [1, {"b": None}]},
        plain("b") | {"answer": None, "images": []},
        plain("c"),
    ]
    loaded = load(jsonl(tmp_path, *rows), max_rejected=0)
    assert loaded.columns == [{"answer": "4", "n": [1, {"b": None}]}, {}, {}]
    table = pa.table({"prompt": ["a"], "chosen": ["x"], "rejected": ["y"], "id": [7], "raw": [b"x"]})
    pq.write_table(table, tmp_path / "rows.parquet")
    assert load(tmp_path / "rows.parquet").columns == [{"id": 7}]  # bytes have no place in JSON
    assert load(jsonl(tmp_path, ultra() | {"prompt_id": "7"}), "ultrafeedback").columns == [{"prompt_id": "7"}]


TURN = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1).map(lambda text: f"({text})")


@settings(deadline=None)  # the machine may be busy
@given(prompt=st.lists(TURN, min_size=1, max_size=7).filter(lambda turns: len(turns) % 2 == 1), response=TURN)
def test_a_dialogue_in_hh_notation_is_read_back_turn_by_turn(prompt: list[str], response: str):
    start = "".join(f"\n\n{('Human', 'Assistant')[i % 2]}: {turn}" for i, turn in enumerate(prompt))
    row = {"chosen": f"{start}\n\nAssistant: {response}", "rejected": f"{start}\n\nAssistant: {response}!"}
    with tempfile.TemporaryDirectory() as folder:
        [preference] = load(jsonl(Path(folder), row), "hh", max_rejected=0).preferences
    assert [turn["content"] for turn in preference.prompt] == prompt
    assert [turn["role"] for turn in preference.prompt] == [("user", "assistant")[i % 2] for i in range(len(prompt))]
    assert (preference.chosen, preference.rejected) == (response, f"{response}!")


@pytest.mark.parametrize(
    ("rejected", "turn"), [("A: Yes. / H: What? / A: b", 2), ("A: Yes? / H: What? / A: b", 3), ("A: Yes?", 3)]
)
def test_dialogues_that_part_early_are_rejected_with_the_turn(tmp_path: Path, rejected: str, turn: int):
    row = hh("A: Yes? / H: Where? / A: a", rejected)
    [found] = load(jsonl(tmp_path, GOOD["hh"], row), "hh").rejected
    assert found.rule == "prompts_differ"
    assert found.detail.endswith(f"part at turn {turn}")


def test_a_repetition_names_the_line_that_stays(tmp_path: Path):
    swapped = plain(chosen="Go away.", rejected="Hello.")
    loaded = load(jsonl(tmp_path, plain("Other?"), plain(), swapped, plain()))
    assert len(loaded.preferences) == 2
    assert [(row.line, row.rule) for row in loaded.rejected] == [(3, "conflicting_label"), (4, "duplicate")]
    assert all("line 2" in row.detail for row in loaded.rejected)


def test_a_bad_row_does_not_make_a_good_one_a_repetition(tmp_path: Path):
    loaded = load(jsonl(tmp_path, plain(chosen="a\0"), plain(chosen="a\0"), plain(chosen="a")))
    assert [row.rule for row in loaded.rejected] == ["control_characters"] * 2


def test_pairs_that_differ_in_case_alone_are_kept(tmp_path: Path):
    assert load(jsonl(tmp_path, plain(chosen="GO AWAY.")), max_rejected=0).rejected == []


def test_the_limit_counts_good_rows_and_reads_no_further(tmp_path: Path):
    rows = [plain("1"), plain(chosen=""), plain("2"), plain(chosen=""), plain("3")]
    loaded = load(jsonl(tmp_path, *rows), limit=2)
    assert [pair.prompt[0]["content"] for pair in loaded.preferences] == ["1", "2"]
    assert [row.line for row in loaded.rejected] == [2]


def test_too_many_bad_rows_are_counted_by_rule_with_examples_and_a_way_out(tmp_path: Path):
    path = jsonl(tmp_path, plain(), b"{", plain(chosen=""), plain(chosen=" "), plain(chosen=None))
    message = refusal(path, max_rejected=0.79)
    assert "4 of 5 rows are bad (80.0%; max_rejected allows 79.0%)" in message
    assert "2 empty: fill in the text or delete the row" in message
    assert [line.split(": ")[0].strip() for line in message.splitlines() if str(path) in line][1:] == [
        f"{path}:{line}" for line in (2, 3, 4, 5)
    ]
    assert len(load(path, max_rejected=0.8).rejected) == 4


def test_a_source_without_a_good_row_is_refused_whatever_is_allowed(tmp_path: Path):
    assert "none of 1 rows is good" in refusal(jsonl(tmp_path, plain(chosen="")), max_rejected=1.0)
    assert "there is no row" in refusal(jsonl(tmp_path), max_rejected=1.0)


def test_a_column_that_no_row_has_is_an_error_that_names_the_close_match(tmp_path: Path):
    row = {"promt": "Hi?", "chosen": "a", "rejected": "b"}
    message = refusal(jsonl(tmp_path, row, row))
    assert "rows.jsonl: no column 'prompt' (did you mean 'promt'?)" in message
    assert "found ['promt', 'chosen', 'rejected']" in message


MANY = [plain(f"Question {i}?", "yes, please", "no") for i in range(2500)]
MANY[2047] = plain("Question 2047?", None, "no")


def write_jsonl_gz(path: Path) -> None:
    path.write_bytes(gzip.compress(b"\n".join(map(as_line, MANY))))


def write_json(path: Path) -> None:
    path.write_text(json.dumps(MANY), encoding="utf-8-sig")


def write_parquet(path: Path) -> None:
    table = pa.Table.from_pylist(MANY)
    pq.write_table(table.append_column("nested.extra", pa.array([{"a": [1]}] * len(MANY))), path)


@pytest.mark.parametrize("write", [write_jsonl_gz, write_json, write_parquet], ids=lambda write: write.__name__)
def test_all_kinds_of_file_give_the_same_rows(tmp_path: Path, write):
    path = tmp_path / f"my.rows.{write.__name__.removeprefix('write_').replace('_', '.')}"
    write(path)
    loaded = load(path, max_rejected=0.01)
    assert [(row.line, row.rule) for row in loaded.rejected] == [(2048, "wrong_type")]
    assert loaded.preferences == [
        Preference([user(f"Question {i}?")], "yes, please", "no") for i in range(2500) if i != 2047
    ]


def write_csv(path: Path, rows: list[list[str]]) -> None:
    with path.open("w", encoding="utf-8-sig", newline="") as file:
        csv.writer(file).writerows(rows)


def test_csv_rows_are_told_by_the_line_they_start_on(tmp_path: Path):
    path = tmp_path / "rows.csv"
    long = "x" * 150_000
    rows = [["extra", "prompt", "chosen", "rejected"], ["", "two\nlines", " ", "b"], ["", 'a "q", here', "a", "b"]]
    write_csv(path, [*rows, ["", "q", "a"], ["", "q", "a", "b", "c"], [], ["", "q", long, "b"]])
    path.write_bytes(path.read_bytes() + ",é?,a,b\r\n".encode("latin-1"))
    loaded = load(path)
    assert loaded.preferences == [
        Preference([user('a "q", here')], "a", "b"),
        Preference([user("q")], long, "b"),
    ]
    assert [(row.line, row.rule) for row in loaded.rejected] == [
        (2, "empty"),
        (5, "bad_csv"),
        (6, "bad_csv"),
        (9, "not_utf8"),
    ]


def test_a_quote_that_never_closes_fails_instead_of_swallowing_rows(tmp_path: Path):
    path = tmp_path / "rows.csv"
    path.write_text('prompt,chosen,rejected\np,a,b\np,"a,b\n' + "q,a,b\n" * 50)
    assert f"{path}:3: broken quoting" in refusal(path)


def test_a_parquet_text_that_is_not_utf8_is_refused_with_its_file(tmp_path: Path):
    raw = pa.array([b"a", b"\xff", b"c"])
    texts = pa.Array.from_buffers(pa.string(), 3, raw.buffers())
    table = pa.table({"prompt": texts, "chosen": ["x", "x", "x"], "rejected": ["y", "y", "y"]})
    pq.write_table(table, tmp_path / "rows.parquet")
    assert "rows.parquet: a text in it is not UTF-8" in refusal(tmp_path / "rows.parquet")


def test_a_parquet_file_brings_message_lists(tmp_path: Path):
    pq.write_table(pa.Table.from_pylist([ultra()]), tmp_path / "rows.parquet")
    loaded = load(tmp_path / "rows.parquet", "ultrafeedback")
    assert loaded.preferences == [Preference([user("Hi?")], "Hello.", "Go away.")]


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        ("cut.jsonl.gz", gzip.compress(json.dumps(plain()).encode(), mtime=0)[:-10], "broken .gz"),
        ("plain.jsonl.gz", b"{}", "broken .gz"),
        ("lines.json", b"{}\n{}", "not one JSON document"),
        ("object.json", b"{}", "holds a dict, not a list"),
        ("latin.json", b'["\xe9"]', "not one JSON document in UTF-8"),
        ("empty.parquet", b"", "not a whole parquet file"),
        ("cut.parquet", b"PAR1 and then nothing", "not a whole parquet file"),
        ("twice.csv", b"prompt,chosen,chosen\n", "a column name appears twice"),
        ("empty.csv", b"", "there is no row"),
        ("rows.xlsx", b"PK", "name files that end with .jsonl"),
    ],
)
def test_an_unreadable_file_is_refused_by_name_and_reason(tmp_path: Path, name: str, content: bytes, part: str):
    (tmp_path / name).write_bytes(content)
    message = refusal(tmp_path / name)
    assert str(tmp_path / name) in message
    assert part in message


def test_a_path_that_leads_nowhere_is_refused(tmp_path: Path):
    assert "no such file" in refusal(tmp_path / "rows.jsonl")
    assert "no such file" in refusal("../owner/name")
    assert "no such file" in refusal("owner/na\0me")


def test_importing_the_module_is_fast():
    code = "import rrlhf.data.load, sys; print({'torch', 'transformers', 'datasets', 'pyarrow'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "set()\n"


def test_the_same_prompt_is_told_whatever_its_case_width_and_spacing():
    assert prompt_hash([user("Ｗhy  is\nthe SKY blue?\u00a0")]) == prompt_hash([user("why is the sky blue?")])
    assert prompt_hash([user("Straße")]) == prompt_hash([user("STRASSE")])
    assert prompt_hash([user("why")]) != prompt_hash([user("why?")])
    assert prompt_hash([user("a")]) != prompt_hash([assistant("a")])
    assert prompt_hash([user("a"), assistant("b"), user("c")]) != prompt_hash([user("a b c")])


def test_the_prompt_hash_never_changes():
    text = '[["user", "why is the sky blue?"]]'  # printf '%s' "$text" | sha256sum
    digest = "64f318bab2b56c61c2522d5afecd9d3c8dfb00c1c43eb0cf695103e0edea8814"
    assert sha256(text.encode()).hexdigest() == prompt_hash([user("Why is the sky blue?")]) == digest


PROMPTS = st.lists(st.text().map(lambda text: [user(text)]), max_size=30)
SEEDS = st.integers(0, 2**32)


@settings(deadline=None)  # the machine may be busy
@given(PROMPTS, PROMPTS, SEEDS)
def test_adding_rows_moves_no_other_row(prompts: list[list[Message]], more: list[list[Message]], seed: int):
    alone = split_by_prompt(prompts, SHARES, seed)
    assert split_by_prompt(more + prompts, SHARES, seed)[len(more) :] == alone
    assert split_by_prompt(prompts[::-1], SHARES, seed)[::-1] == alone


@settings(deadline=None)  # the machine may be busy
@given(PROMPTS, SEEDS)
def test_no_prompt_stands_in_two_splits(prompts: list[list[Message]], seed: int):
    variants = [[user(f"  {unicodedata.normalize('NFKC', p[0]['content'])}\n")] for p in prompts]
    names = split_by_prompt(prompts + variants, SHARES, seed)
    splits: dict[str, set[str]] = {name: set() for name in SHARES}
    for prompt, name in zip(prompts + variants, names, strict=True):
        splits[name].add(prompt_hash(prompt))
    assert sum(map(len, splits.values())) == len({prompt_hash(prompt) for prompt in prompts})


@pytest.mark.parametrize("seed", range(3))
def test_the_splits_have_their_shares(seed: int):
    counts = Counter(split_by_prompt([[user(str(i))] for i in range(4000)], SHARES, seed))
    for name, share in SHARES.items():
        assert abs(counts[name] - 4000 * share) < 3.5 * (4000 * share * (1 - share)) ** 0.5


def test_another_seed_splits_otherwise():
    prompts = [[user(str(i))] for i in range(100)]
    assert split_by_prompt(prompts, SHARES, 1) != split_by_prompt(prompts, SHARES, 2)


def test_a_share_of_zero_gets_nothing_wherever_it_stands():
    shares = {"a": 0.0, "b": 0.3, "c": 0.0, "d": 0.7 - 1e-10, "e": 0.0}
    assert set(split_by_prompt([[user(str(i))] for i in range(500)], shares, 0)) == {"b", "d"}


@pytest.mark.parametrize(
    "shares", [{"a": 0.5, "b": 0.4}, {"a": 1.0, "b": 1e-8}, {"a": 1.5, "b": -0.5}, {"a": float("nan")}, {}]
)
def test_shares_that_do_not_sum_to_one_are_refused(shares: dict[str, float]):
    with pytest.raises(ValueError, match="sum to 1"):
        split_by_prompt([], shares, 0)
