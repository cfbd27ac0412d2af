"""Canaries: no key or password gets to the terminal, a log or an error that others keep."""

import logging
import sys

import pytest

from rrlhf.located import ParamsError
from rrlhf.pipeline.params import load_params
from rrlhf.progress import say
from rrlhf.redact import redact_output, redacted, without_secrets
from rrlhf.tools.command_line import mending

CANARY = "c4n4ry-0123456789"


@pytest.mark.parametrize(
    "text",
    [
        f"http://user:{CANARY}@host/path",
        f"https://{CANARY}@host",
        f"api_key={CANARY}",
        f"MLFLOW_TRACKING_TOKEN='{CANARY}'",
        f'{{"password": "{CANARY}"}}',
        f"Authorization: Bearer {CANARY}",
        f"401 for hf_{CANARY}",
        f"-----BEGIN EC PRIVATE KEY-----\n{CANARY}\n-----END EC PRIVATE KEY-----",
    ],
)
def test_a_secret_is_known_by_its_name_or_its_pattern(text):
    assert CANARY not in redacted(f"before {text} after")
    assert redacted(f"before {text} after").startswith("before ")


@pytest.mark.parametrize(
    "text", ["eos_token: <|endoftext|>", "tokens_per_second: 12345.678", "s3://bucket/a@b", "key: artifacts/sft/0123"]
)
def test_what_is_no_secret_stays(text):
    assert redacted(text) == text


def test_the_value_of_a_secret_variable_is_hidden_wherever_it_stands(monkeypatch):
    monkeypatch.setenv("SOME_SERVICE_KEY", CANARY)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "whatever else")
    assert redacted(f"cannot open {CANARY}: whatever else") == "cannot open [redacted]: whatever else"


def test_an_error_and_those_behind_it_lose_their_secrets():
    def fail():
        try:
            raise KeyError(f"token={CANARY}")
        except KeyError as error:
            raise OSError(2, "no such file", f"http://user:{CANARY}@host") from error

    with pytest.raises(ValueError, match="no such file") as caught, without_secrets():
        fail()
    assert CANARY not in str(caught.getrepr())


def test_what_is_printed_and_logged_loses_its_secrets(monkeypatch, capsys, caplog):
    monkeypatch.setattr(sys, "stdout", sys.stdout)
    monkeypatch.setattr(sys, "stderr", sys.stderr)
    before = logging.getLogRecordFactory()
    redact_output()
    try:
        print(f"token={CANARY}")
        print(f"token={CANARY}", file=sys.stderr)
        try:
            raise ValueError(f"token={CANARY}")
        except ValueError:
            logging.getLogger("user").exception("failed with %s", f"token={CANARY}")
    finally:
        logging.setLogRecordFactory(before)
    said = capsys.readouterr()
    assert "[redacted]" in said.out
    assert "[redacted]" in said.err
    assert caplog.text.count("[redacted]") >= 2  # message and trace
    assert CANARY not in said.out + said.err + caplog.text


ACTING = "\x1b[2J\x1b]0;owned\x07\u202egnp\0\ud800\r"
SEEN = "⟨U+001B⟩[2J⟨U+001B⟩]0;owned⟨U+0007⟩⟨U+202E⟩gnp⟨U+0000⟩⟨U+D800⟩⟨U+000D⟩"


def test_a_text_of_others_does_not_act_on_a_terminal_or_in_a_log(capsys, caplog):
    def fail():
        raise ValueError(f"reward function f raised {ACTING}")

    say(f"note: {ACTING}\tand\nso on")
    with pytest.raises(SystemExit), mending():
        fail()
    assert capsys.readouterr().err == f"note: {SEEN}\tand\nso on\nreward function f raised {SEEN}\n"
    factory = logging.getLogRecordFactory()
    redact_output()
    try:
        logging.getLogger("some").warning("read %s", ACTING)
        try:
            fail()
        except ValueError:
            logging.getLogger("some").exception("failed")
    finally:
        logging.setLogRecordFactory(factory)
    assert f"read {SEEN}" in caplog.text
    assert caplog.text.count(SEEN) == 2
    assert "\x1b" not in caplog.text


def test_a_secret_in_the_settings_is_refused_before_anything_keeps_it(project):
    wrong = {
        "prepare.source": f"https://user:{CANARY}@host/data.jsonl",
        "prepare.format": "rows",
        "seed": f"hf_{CANARY}",
    }
    with pytest.raises(ParamsError, match=r"prepare\.source: it holds a password or a key") as caught:
        load_params(project, "tiny", wrong)
    assert CANARY not in str(caught.value)
