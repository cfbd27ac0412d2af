"""The words every layer shares: plain, frozen shapes without behaviour."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypedDict

Json = None | bool | int | float | str | list["Json"] | dict[str, "Json"]


class Message(TypedDict):
    """One turn of a dialogue; `role` is "system", "user" or "assistant"."""

    role: str
    content: str


class Demonstration(NamedTuple):
    """A prompt with the response that supervised fine-tuning imitates."""

    prompt: list[Message]
    response: str


class Preference(NamedTuple):
    """A prompt with two responses, of which `chosen` was preferred."""

    prompt: list[Message]
    chosen: str
    rejected: str


class Dataset(NamedTuple):
    """A prepared data set: the folder of its tables, and the digest of its content."""

    name: str
    path: Path
    digest: str


SUMMARY = "summary.json"  # file of a data set: rows by table and by the rule that they break, and further columns

Metrics = dict[str, float]
Log = Callable[[Metrics], None]
