"""What no text may bring to whoever sees or keeps it: keys and passwords, and what acts on a terminal.

Secrets are known by name, as the value of an environment variable or what stands behind a name; and by pattern, as
addresses with a password and the keys of well-known services have one.
"""

import io
import logging
import os
import re
import sys
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, TextIO

HIDDEN = "[redacted]"
SHORTEST = 8  # letters of an environment variable's value: "true" and "default" stand in many other places
VARIABLE = re.compile(r"(api_?key|access_?key|private_?key|secret|token|passw(or)?d|credentials?)(_|$)|_key$", re.I)
NAMED = r"\b([\w-]*[_-])?(api_?key|access_?key|private_?key|secret(_?key)?|passw(or)?d|passphrase|credentials?)"
TOKEN = r"\b(\w*(access|auth|api|hf|hub|tracking|refresh|session|github)[_-]?)?token"  # not eos_token
PATTERNS = (  # what is hidden is all, or what stands behind (?P<before>...)
    re.compile(r"(?<=://)[^/@\s'\"]+(?=@)"),  # user and password of an address
    re.compile(rf"(?P<before>({NAMED}|{TOKEN})['\"]?\s*[=:]\s*['\"]?)[^\s'\",;&)]{{6,}}", re.I),
    re.compile(r"(?P<before>\b(bearer|basic)\s+)[\w.~+/=-]{8,}", re.I),
    re.compile(r"\b(hf_|sk-|gh[pousr]_|github_pat_|glpat-|xox[abpr]-|AKIA|AIza|pypi-)[\w-]{12,}"),
    re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL),
)


def redacted(text: str) -> str:
    """Return a text without the secrets in it."""
    for name, value in os.environ.items():
        if len(value) >= SHORTEST and VARIABLE.search(name):
            text = text.replace(value, HIDDEN)
    for pattern in PATTERNS:
        text = pattern.sub(lambda found: f"{found.groupdict().get('before', '')}{HIDDEN}", text)
    return text


def visible(text: str) -> str:
    """Show control and other unseen characters as ⟨U+001B⟩, so that no text acts on a terminal or hides in a page."""
    return "".join(character if character in "\n\t" else _seen(character) for character in text)


def _seen(character: str) -> str:
    hidden = unicodedata.category(character) in {"Cc", "Cf", "Cs", "Zl", "Zp"}
    return f"⟨U+{ord(character):04X}⟩" if hidden else character


@contextmanager
def without_secrets() -> Iterator[None]:
    """Let no error out that tells a secret: whoever catches it may keep it, as Prefect does."""
    try:
        yield
    except Exception as error:
        one: BaseException | None = error
        while one:
            one.args = tuple(redacted(each) if isinstance(each, str) else each for each in one.args)
            if (text := str(one)) != redacted(text):  # it makes its text of something else
                raise ValueError(f"{type(error).__name__}: {redacted(str(error))}") from None
            one = one.__cause__ or one.__context__
        raise


def redact_output() -> None:
    """Have everything that this process prints or logs from now on go through `redacted`; a closed stream is none."""
    if not isinstance(sys.stderr, _Redacting):
        sys.stdout, sys.stderr = _Redacting(sys.stdout or io.StringIO()), _Redacting(sys.stderr or io.StringIO())
    made = logging.getLogRecordFactory()
    if not isinstance(made, partial):
        logging.setLogRecordFactory(partial(_record, made))


class _Redacting:
    """A stream of text that writes no secret."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        return self._stream.write(redacted(text))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _record(made: Callable[..., logging.LogRecord], *arguments: Any, **named: Any) -> logging.LogRecord:
    """Return a log's record without secrets or what acts on a terminal, wherever handlers then take it."""
    record = made(*arguments, **named)
    with suppress(TypeError, ValueError):  # of a message that does not go with its arguments
        if (text := record.getMessage()) != visible(redacted(text)):
            record.msg, record.args = visible(redacted(text)), ()
    if record.exc_info and record.exc_info[1]:
        record.exc_text = visible(redacted(logging.Formatter().formatException(record.exc_info)))
    return record
