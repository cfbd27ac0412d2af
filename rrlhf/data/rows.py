"""One row of preference data: the formats it comes in, and the rules by which it is refused.

Texts are kept as they are: nothing is cleaned and no special token is parsed. Only the turns of an HH dialogue lose
their outer whitespace, because it belongs to the notation.
"""

import re
import reprlib
import sys
import unicodedata
from collections.abc import Callable, Mapping
from typing import NamedTuple

from rrlhf.types import Message, Preference

Row = Mapping[str, object]

MAX_CHARACTERS = 200_000  # of one field

FIXES = {  # every rule, and what to do about the rows that break it
    "not_utf8": "save the file as UTF-8",
    "bad_json": "write one JSON object per line",
    "bad_csv": "give every row as many cells as the header, and quote cells that hold the delimiter or line breaks",
    "not_an_object": 'write each row as an object: {"prompt": ..., "chosen": ..., "rejected": ...}',
    "missing_field": "give every row all fields of its format",
    "no_prompt": "give the row a prompt, or write chosen and rejected as whole dialogues",
    "wrong_type": "write texts as strings or lists of messages, and scores as numbers",
    "not_text": "delete the row: only text is read, no images, sounds, tools or reasoning beside it",
    "empty": "fill in the text or delete the row",
    "too_long": f"shorten the text to {MAX_CHARACTERS:,} characters",
    "control_characters": "remove NUL characters and lone surrogates",
    "role_order": "let user and assistant take turns, after at most one system turn",
    "no_final_assistant_turn": "end both dialogues with the response of the assistant",
    "not_one_response": "let chosen and rejected be one turn of the assistant each, or whole dialogues",
    "prompts_differ": "let both dialogues have the same turns before the last, those of prompt and system",
    "refused_by_template": "take out what the chat template refuses, such as a system turn, or name another base",
    "no_room": "shorten the system turn, or raise model.prompt_tokens",
    "score_not_finite": "write scores as finite numbers",
    "score_contradicts_label": "turn the label, correct the scores or delete the row",
    "score_tie": "delete the row: its scores state no preference",
    "chosen_equals_rejected": "delete the row: it states no preference",
    "duplicate": "delete the repetition",
    "conflicting_label": "decide which response is better and delete the other row",
}

SCORES = ("score_chosen", "score_rejected")
NOT_READ = ("tools", "images", "image", "videos", "video", "audios", "audio")  # columns that change what is asked
NOT_READ_IN_A_TURN = ("tool_calls", "reasoning_content", "thinking", "images")

_CONTROL = re.compile("[\0\ud800-\udfff]")
_HH_TURN = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")
_HH_ROLES = {"Human": "user", "Assistant": "assistant"}
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}


class RowError(Exception):
    """A row breaks a rule; `detail` quotes untrusted text only with escapes."""

    def __init__(self, rule: str, detail: str) -> None:
        super().__init__(f"{rule}: {detail}")
        self.rule, self.detail = rule, detail


class Format(NamedTuple):
    """How a source writes its rows."""

    needed: tuple[str, ...]  # columns that every row has
    optional: tuple[str, ...]  # columns that are read where they are; what a row has beside these is handed on
    read: Callable[[Row], Preference]
    split: str  # on the hub, unless a split is named


class _Side(NamedTuple):
    """One of the two responses, and the whole dialogue that it ends, where it is written as one."""

    dialogue: list[Message] | None
    response: str


def hh_row(row: Row) -> Preference:
    """Read two full dialogues in the notation of Bai et al. 2022 (arXiv 2204.05862)."""
    chosen, rejected = _hh_dialogue(row, "chosen"), _hh_dialogue(row, "rejected")
    return _distinct(_shared(chosen, rejected), chosen[-1]["content"], rejected[-1]["content"])


def plain_row(row: Row) -> Preference:
    """Read a prompt and two responses, each as text or as messages, or two dialogues that share all but the last turn.

    Where a row says something twice (a prompt before whole dialogues, a system turn in a column of its own, scores
    beside the label), the two must agree.
    """
    _refuse_what_is_not_read(row, NOT_READ, "the row")
    chosen, rejected = _side(row, "chosen"), _side(row, "rejected")
    prompt = _with_system(row, _prompt(row, _before(chosen, rejected)))
    preference = _distinct(prompt, chosen.response, rejected.response)
    if any(row.get(name) is not None for name in SCORES):
        _refuse_contradiction(*(_score(row, name) for name in SCORES))
    return preference


def ultrafeedback_row(row: Row) -> Preference:
    """Read a row that must have a prompt and scores."""
    _field(row, "prompt")
    for name in SCORES:
        _score(row, name)
    return plain_row(row)


def subset_of(row: Row) -> str:
    """Return the part of a benchmark that a row belongs to."""
    return text_field(row, "subset")


_PAIR = ("chosen", "rejected")
_ASKED = ("prompt", "conversations", "system", *NOT_READ)
FORMATS = {
    "hh": Format(_PAIR, (), hh_row, "train"),
    "ultrafeedback": Format(("prompt", *_PAIR, *SCORES), _ASKED, ultrafeedback_row, "train_prefs"),
    "rows": Format(_PAIR, (*_ASKED, *SCORES), plain_row, "train"),
}


def normalised(text: str) -> str:
    """Return the text without what does not change its meaning: letter case, width of characters, whitespace."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(unicodedata.normalize("NFKC", folded).split())


def text_field(row: Row, name: str) -> str:
    """Return a field that must be there and be text. Raises RowError."""
    return _text(_field(row, name), name)


def _distinct(prompt: list[Message], chosen: str, rejected: str) -> Preference:
    if chosen.strip() == rejected.strip():
        raise RowError("chosen_equals_rejected", f"both are {reprlib.repr(chosen)}")
    return Preference(prompt, chosen, rejected)


def _side(row: Row, name: str) -> _Side:
    """Read a response: as text, as one turn, or as the last turn of a dialogue."""
    value = _field(row, name)
    if isinstance(value, str):
        return _Side(None, _text(value, name))
    turns = _messages([value] if isinstance(value, dict) else value, name)
    if turns[0]["role"] != "assistant":
        return _Side(_complete(turns, name), turns[-1]["content"])
    if len(turns) > 1:
        raise RowError("not_one_response", f"{name} has {len(turns)} turns, the first of the assistant")
    return _Side(None, turns[0]["content"])


def _before(chosen: _Side, rejected: _Side) -> list[Message] | None:
    """Return the turns before both responses; None where they are no dialogues."""
    if chosen.dialogue is not None and rejected.dialogue is not None:
        return _shared(chosen.dialogue, rejected.dialogue)
    if chosen.dialogue is not rejected.dialogue:
        raise RowError("prompts_differ", f"only {'chosen' if chosen.dialogue else 'rejected'} is a whole dialogue")
    return None


def _shared(chosen: list[Message], rejected: list[Message]) -> list[Message]:
    """Return all turns but the last, which two dialogues must have in common."""
    if chosen[:-1] != rejected[:-1]:
        lengths = len(chosen), len(rejected)
        parting = next((i for i in range(min(lengths)) if chosen[i] != rejected[i]), min(lengths)) + 1
        raise RowError("prompts_differ", f"dialogues of {lengths[0]} and {lengths[1]} turns part at turn {parting}")
    return chosen[:-1]


def _prompt(row: Row, shared: list[Message] | None) -> list[Message]:
    """Return what both responses answer: the turns that their dialogues share, or the prompt's own."""
    given = {name: row[name] for name in ("conversations", "prompt") if row.get(name) is not None}
    found = shared
    for name, value in given.items():
        if isinstance(value, str):
            asked = [Message(role="user", content=_text(value, name))]
            if found and normalised(value) not in [normalised(turn["content"]) for turn in found if _is_user(turn)]:
                raise RowError("prompts_differ", f"{name} {reprlib.repr(value)} is no user turn of the dialogue")
        else:
            asked = _alternating(_messages(value, name), name)
            if not _is_user(asked[-1]):
                raise RowError("role_order", f"{name} ends with a turn of {asked[-1]['role']}, not of user")
            if found and asked != found:
                raise RowError("prompts_differ", f"{name} is not what the dialogue has before its last turn")
        found = found or asked
    if found is None:
        raise RowError("no_prompt", "there is no prompt, and chosen and rejected are no dialogues")
    return found


def _with_system(row: Row, prompt: list[Message]) -> list[Message]:
    """Put the system turn that a row has in a column of its own before its prompt."""
    value = row.get("system")
    if value is None or value == "":
        return prompt
    system = Message(role="system", content=_text(value, "system"))
    if prompt[0]["role"] != "system":
        return [system, *prompt]
    if prompt[0] != system:
        raise RowError("prompts_differ", "the column system is another than the system turn")
    return prompt


def _refuse_contradiction(chosen: float, rejected: float) -> None:
    """Refuse a pair whose scores do not say what its label says."""
    if chosen == rejected:
        raise RowError("score_tie", f"both score {chosen:g}")
    if chosen < rejected:
        raise RowError("score_contradicts_label", f"chosen scores {chosen:g}, rejected {rejected:g}")


def _refuse_what_is_not_read(where: Row, names: tuple[str, ...], of: str) -> None:
    for name in names:
        if where.get(name) not in (None, "", [], {}):
            raise RowError("not_text", f"{of} has {name}")


def _hh_dialogue(row: Row, name: str) -> list[Message]:
    before, *turns = _HH_TURN.split(text_field(row, name))
    if before:
        raise RowError("role_order", f"{name} starts with {reprlib.repr(before)}, not with 'Human:'")
    messages = [
        Message(role=_HH_ROLES[speaker], content=_text(content.strip(), f"turn {i} of {name}"))
        for i, (speaker, content) in enumerate(zip(turns[::2], turns[1::2], strict=True), start=1)
    ]
    return _complete(messages, name)


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


def _is_user(message: Message) -> bool:
    return message["role"] == "user"


def _messages(value: object, name: str) -> list[Message]:
    if not isinstance(value, list):
        raise RowError("wrong_type", f"{name} is {_kind(value)}, neither text nor a list of messages")
    if not value:
        raise RowError("empty", f"{name} has no turn")
    messages = [_message(turn, f"turn {i} of {name}") for i, turn in enumerate(value, start=1)]
    _check_length(sum(len(message["content"]) for message in messages), name)
    return messages


def _message(turn: object, name: str) -> Message:
    """Read a turn with role and content, or with ShareGPT's from and value."""
    if not isinstance(turn, dict):
        raise RowError("wrong_type", f"{name} is {_kind(turn)}, not an object with role and content")
    _refuse_what_is_not_read(turn, NOT_READ_IN_A_TURN, name)
    if "from" in turn:
        speaker = _text(turn["from"], f"from of {name}")
        return Message(role=_SHAREGPT_ROLES.get(speaker, speaker), content=_content(_field(turn, "value", name), name))
    role = _text(_field(turn, "role", of=name), f"role of {name}")
    return Message(role=role, content=_content(_field(turn, "content", of=name), name))


def _content(value: object, name: str) -> str:
    """Return a turn's text, which may come in parts: they are put together as they are."""
    if not isinstance(value, list):
        return _text(value, name)
    return _text("".join(_part(part, f"part {i} of {name}") for i, part in enumerate(value, start=1)), name)


def _part(part: object, name: str) -> str:
    if not isinstance(part, dict):
        raise RowError("wrong_type", f"{name} is {_kind(part)}, not an object with type and text")
    if part.get("type") != "text":
        raise RowError("not_text", f"{name} is of type {reprlib.repr(part.get('type'))}")
    text = _field(part, "text", of=name)
    if not isinstance(text, str):
        raise RowError("wrong_type", f"{name} is {_kind(text)}, not text")
    return text


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
