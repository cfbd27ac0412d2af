"""One row of preference data: the formats it comes in, and the rules by which it is refused.

Texts are kept as they are: nothing is cleaned and no special token is parsed. Only the turns of an HH dialogue lose
their outer whitespace, because it belongs to the notation.
"""

from __future__ import annotations

import re
import reprlib
import sys
import unicodedata
from collections.abc import Callable, Mapping
from typing import NamedTuple

from rrlhf.types import Message, Preference

Row = Mapping[str, object]
Scores = tuple[float, float]  # of chosen, of rejected

MAX_CHARACTERS = 200_000  # of one field

FIXES = {  # every rule, and what to do about the rows that break it
    "not_utf8": "save the file as UTF-8",
    "bad_json": "write one JSON object per line",
    "bad_csv": "give every row as many cells as the header, and quote cells that hold commas or line breaks",
    "not_an_object": 'write each row as an object: {"prompt": ..., "chosen": ..., "rejected": ...}',
    "missing_field": "give every row all fields of its format",
    "wrong_type": "write texts as strings and scores as numbers",
    "empty": "fill in the text or delete the row",
    "too_long": f"shorten the text to {MAX_CHARACTERS:,} characters",
    "control_characters": "remove NUL characters and lone surrogates",
    "role_order": "let user and assistant take turns, after at most one system turn",
    "no_final_assistant_turn": "end both dialogues with the response of the assistant",
    "prompts_differ": "let the two dialogues differ in their last turn only",
    "score_not_finite": "write scores as finite numbers",
    "chosen_equals_rejected": "delete the row: it states no preference",
    "duplicate": "delete the repetition",
    "conflicting_label": "decide which response is better and delete the other row",
}

_CONTROL = re.compile("[\0\ud800-\udfff]")
_HH_TURN = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")
_HH_ROLES = {"Human": "user", "Assistant": "assistant"}


class RowError(Exception):
    """A row breaks a rule; `detail` quotes untrusted text only with escapes."""

    def __init__(self, rule: str, detail: str) -> None:
        super().__init__(f"{rule}: {detail}")
        self.rule, self.detail = rule, detail


class Format(NamedTuple):
    """How a source writes its rows: the fields that it must have, how a row is read, and its split on the hub."""

    fields: tuple[str, ...]
    read: Callable[[Row], tuple[Preference, Scores | None]]
    split: str


def hh_row(row: Row) -> tuple[Preference, None]:
    """Read two full dialogues in the notation of Bai et al. 2022 (arXiv 2204.05862)."""
    return _common_prompt(_hh_dialogue(row, "chosen"), _hh_dialogue(row, "rejected")), None


def ultrafeedback_row(row: Row) -> tuple[Preference, Scores]:
    """Read two full message lists and their scores; field `prompt` must be one of the user's turns."""
    asked = _text(_field(row, "prompt"), "prompt")
    preference = _common_prompt(_dialogue(row, "chosen"), _dialogue(row, "rejected"))
    turns = [normalised(turn["content"]) for turn in preference.prompt if turn["role"] == "user"]
    if normalised(asked) not in turns:
        raise RowError("prompts_differ", f"prompt {reprlib.repr(asked)} is no user turn of chosen")
    return preference, (_score(row, "score_chosen"), _score(row, "score_rejected"))


def plain_row(row: Row) -> tuple[Preference, None]:
    """Read a prompt, as text or as messages, and two responses."""
    chosen, rejected = _text(_field(row, "chosen"), "chosen"), _text(_field(row, "rejected"), "rejected")
    return _distinct(_prompt(_field(row, "prompt")), chosen, rejected), None


def subset_of(row: Row) -> str:
    """Return the part of a benchmark that a row belongs to."""
    return _text(_field(row, "subset"), "subset")


FORMATS = {
    "hh": Format(("chosen", "rejected"), hh_row, "train"),
    "ultrafeedback": Format(
        ("prompt", "chosen", "rejected", "score_chosen", "score_rejected"), ultrafeedback_row, "train_prefs"
    ),
    "rows": Format(("prompt", "chosen", "rejected"), plain_row, "train"),
}


def normalised(text: str) -> str:
    """Return the text without what does not change its meaning: letter case, width of characters, whitespace."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(unicodedata.normalize("NFKC", folded).split())


def _common_prompt(chosen: list[Message], rejected: list[Message]) -> Preference:
    """Return the shared turns as prompt and the last turns as responses."""
    *prompt, better = chosen
    *other_prompt, worse = rejected
    if prompt != other_prompt:
        lengths = len(chosen), len(rejected)
        parting = next((i for i in range(min(lengths)) if chosen[i] != rejected[i]), min(lengths)) + 1
        raise RowError("prompts_differ", f"dialogues of {lengths[0]} and {lengths[1]} turns part at turn {parting}")
    return _distinct(prompt, better["content"], worse["content"])


def _distinct(prompt: list[Message], chosen: str, rejected: str) -> Preference:
    if chosen.strip() == rejected.strip():
        raise RowError("chosen_equals_rejected", f"both are {reprlib.repr(chosen)}")
    return Preference(prompt, chosen, rejected)


def _hh_dialogue(row: Row, name: str) -> list[Message]:
    before, *turns = _HH_TURN.split(_text(_field(row, name), name))
    if before:
        raise RowError("role_order", f"{name} starts with {reprlib.repr(before)}, not with 'Human:'")
    messages = [
        Message(role=_HH_ROLES[speaker], content=_text(content.strip(), f"turn {i} of {name}"))
        for i, (speaker, content) in enumerate(zip(turns[::2], turns[1::2], strict=True), start=1)
    ]
    return _complete(messages, name)


def _dialogue(row: Row, name: str) -> list[Message]:
    return _complete(_messages(_field(row, name), name), name)


def _prompt(value: object) -> list[Message]:
    if isinstance(value, str):
        return [Message(role="user", content=_text(value, "prompt"))]
    messages = _alternating(_messages(value, "prompt"), "prompt")
    if messages[-1]["role"] != "user":
        raise RowError("role_order", f"prompt ends with a turn of {messages[-1]['role']}, not of user")
    return messages


def _complete(messages: list[Message], name: str) -> list[Message]:
    """Check a dialogue that ends with the response."""
    _alternating(messages, name)
    if messages[-1]["role"] != "assistant":
        raise RowError("no_final_assistant_turn", f"{name} ends with a turn of {messages[-1]['role']}")
    return messages


def _alternating(messages: list[Message], name: str) -> list[Message]:
    """Check that user and assistant take turns, the user first, after at most one system turn."""
    system_turns = int(messages[0]["role"] == "system")
    for i, message in enumerate(messages):
        expected = "system" if i < system_turns else ("user", "assistant")[(i - system_turns) % 2]
        if message["role"] != expected:
            found = reprlib.repr(message["role"])
            raise RowError("role_order", f"turn {i + 1} of {name} is of {found}, not of {expected!r}")
    return messages


def _messages(value: object, name: str) -> list[Message]:
    if not isinstance(value, list):
        raise RowError("wrong_type", f"{name} is {_kind(value)}, not a list of messages")
    if not value:
        raise RowError("empty", f"{name} has no turn")
    messages = [_message(turn, f"turn {i} of {name}") for i, turn in enumerate(value, start=1)]
    _check_length(sum(len(message["content"]) for message in messages), name)
    return messages


def _message(turn: object, name: str) -> Message:
    if not isinstance(turn, dict):
        raise RowError("wrong_type", f"{name} is {_kind(turn)}, not an object with role and content")
    role = _text(_field(turn, "role", of=name), f"role of {name}")
    return Message(role=role, content=_text(_field(turn, "content", of=name), name))


def _field(row: Row, name: str, of: str = "the row") -> object:
    if name not in row:
        raise RowError("missing_field", f"{of} has no {name}")
    return row[name]


def _text(value: object, name: str) -> str:
    if not isinstance(value, str):
        raise RowError("wrong_type", f"{name} is {_kind(value)}, not text")
    _check_length(len(value), name)
    if all(letter.isspace() or unicodedata.category(letter) == "Cf" for letter in value):  # Cf: zero width
        raise RowError("empty", f"{name} has no visible character")
    if found := _CONTROL.search(value):
        raise RowError("control_characters", f"{name} has {found[0]!a} at character {found.start() + 1}")
    return value


def _check_length(characters: int, name: str) -> None:
    if characters > MAX_CHARACTERS:
        raise RowError("too_long", f"{name} has {characters:,} characters, more than {MAX_CHARACTERS:,}")


def _score(row: Row, name: str) -> float:
    value = _field(row, name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RowError("wrong_type", f"{name} is {_kind(value)}, not a number")
    if not abs(value) <= sys.float_info.max:  # NaN, infinity, or an integer beyond all floats
        raise RowError("score_not_finite", f"{name} is {reprlib.repr(value)}")
    return float(value)


def _kind(value: object) -> str:
    return "null" if value is None else f"{type(value).__name__} {reprlib.repr(value)}"
