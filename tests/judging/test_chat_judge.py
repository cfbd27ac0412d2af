"""A judge behind an address: what becomes of its verdicts, its failures, and of what it was asked before."""

import json
import threading
from collections import Counter

import pytest
import torch
from chat_server import Reply, chat_server, longer

from rrlhf import stopping
from rrlhf.config import ChatJudge
from rrlhf.judging.chat import ANSWERS, Comparisons, check_chat
from rrlhf.located import ParamsError
from rrlhf.pipeline.check import check_judge
from rrlhf.pipeline.plan import Planned

OURS = ["long answer", "no", "same", "equal length"]
THEIRS = ["short", "longer than no", "same", "length equal"]
PROMPTS = [[{"role": "user", "content": f"Question {n}?"}] for n in range(4)]
KEY = "sk-" + "secret" * 4


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own_with_a_key(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


def wins(address, **settings):
    judge = Comparisons(ChatJudge(address=address, name="gpt-x", **settings))
    return judge.wins(PROMPTS, OURS, THEIRS, "judge"), judge.told()


def test_both_orders_are_asked_and_their_verdict_counts():
    with chat_server(longer) as (address, requests):
        found, told = wins(address, criteria="Prefer brevity.", options={"temperature": 0.5, "max_tokens": 9})
    assert found.tolist() == [1.0, 0.0, 0.5, 0.5]
    assert len(requests) == told.requests == 6  # equal answers tie unasked
    assert (told.prompt_tokens, told.completion_tokens, told.failures) == (60, 12, {})
    for request in requests:
        assert request["path"] == "/v1/chat/completions"
        assert request["headers"]["Authorization"] == f"Bearer {KEY}"
        assert (request["model"], request["temperature"], request["max_tokens"]) == ("gpt-x", 0.5, 9)
        assert "Prefer brevity." in request["messages"][0]["content"]


def test_a_judge_that_likes_a_place_ties_everything():
    for place in "AB":
        with chat_server(lambda _, place=place: f"[[{place}]]") as (address, _):
            found, _ = wins(address)
        assert found.tolist() == [0.5] * 4


def test_nothing_is_asked_twice_and_the_key_is_not_kept():
    with chat_server(longer) as (address, requests):
        first, again = wins(address), wins(address)
        assert len(requests) == 6
        assert torch.equal(first[0], again[0])
        assert first[1] == again[1]  # what it cost is told alike
        wins(address, criteria="Prefer brevity.")
        assert len(requests) == 12
    kept = [path.read_text() for path in ANSWERS.iterdir()]
    assert len(kept) == 12
    assert not any(KEY in text for text in kept)
    assert json.loads(kept[0])["choices"][0]["message"]["content"].startswith("The longer one.")


def test_a_busy_server_is_asked_again():
    seen = Counter()

    def busy_once(asked):
        seen[asked] += 1
        return longer(asked) if seen[asked] > 1 else Reply(429)

    with chat_server(busy_once) as (address, requests):
        found, told = wins(address)
    assert found.tolist() == [1.0, 0.0, 0.5, 0.5]
    assert len(requests) == 12
    assert told.failures == {}


@pytest.mark.parametrize(
    ("answer", "reason", "tries"),
    [
        (lambda _: Reply(500), "HTTP 500", 6),
        (lambda _: Reply(400), "HTTP 400", 1),
        (lambda _: Reply(200, "<html>"), "DecodingError", 1),
        (lambda _: "I like both.", "answer without verdict", 1),
        (lambda _: {"content": None, "refusal": "I cannot judge that."}, "refused", 1),
    ],
)
def test_without_verdicts_the_evaluation_fails_unless_that_is_allowed(answer, reason, tries):
    with chat_server(answer) as (address, requests):
        with pytest.raises(
            ValueError, match=rf"gpt-x gave no verdict on 1 of 3 comparisons.*max_failed 0\.1.*{reason}"
        ):
            wins(address, at_once=1)
        assert len(requests) <= 2 * tries  # it did not go on to the end
        found, told = wins(address, max_failed=1.0)
    assert found.isnan().tolist() == [True, True, False, True]
    assert told.failures == {reason: 3}
    assert max(Counter(json.dumps(request["messages"]) for request in requests).values()) <= 2 * tries


def test_a_wrong_key_ends_the_comparisons_at_once():
    with (
        chat_server(lambda _: Reply(401, f"Incorrect API key provided: {KEY}")) as (address, requests),
        pytest.raises(ParamsError, match=r"HTTP 401; check the key in OPENAI_API_KEY") as raised,
    ):
        wins(address, at_once=1)
    assert KEY not in str(raised.value)
    assert len(requests) <= 3


@pytest.mark.parametrize(
    ("status", "look"), [(401, "the key in OPENAI_API_KEY"), (404, "address, below .* and name"), (400, "options")]
)
def test_what_is_wrong_is_told_before_anything_is_compared(status, look):
    with chat_server(lambda _: Reply(status, "no such model")) as (address, requests):
        with pytest.raises(ParamsError, match=rf"with HTTP {status}; check .*{look}.*no such model"):
            check_chat(ChatJudge(address=address, name="gpt-x"))
        assert len(requests) == 1
    with pytest.raises(ParamsError, match=r"evaluate\.judge\.address .* no answer"):
        check_chat(ChatJudge(address=address, name="gpt-x"))


def test_a_key_is_needed_unless_none_is_sent(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    with chat_server(lambda _: "Yes.") as (address, requests):
        with pytest.raises(ParamsError, match="the environment has no OPENAI_API_KEY"):
            check_chat(ChatJudge(address=address, name="gpt-x"))
        check_chat(ChatJudge(address=address, name="gpt-x", key_variable=None))
    [request] = requests
    assert "Authorization" not in request["headers"]


def test_it_is_asked_beforehand_only_where_policies_will_be_compared():
    with chat_server(lambda _: "Yes.") as (address, requests):
        judge = ChatJudge(address=address, name="gpt-x")
        check_judge(judge, [Planned("ppo-robust", "run", [], None), Planned("evaluate", "reuse", [], None)])
        assert not requests
        check_judge(judge, [Planned("evaluate", "upstream", [], None)])
        assert len(requests) == 1


def test_an_interrupted_comparison_keeps_what_was_answered():
    asked = []

    def stopping_at_the_third(text):
        asked.append(text)
        if len(asked) == 3:
            stopping.stop.set()
        return longer(text)

    with chat_server(stopping_at_the_third) as (address, requests):
        try:
            with pytest.raises(stopping.Interrupted):
                wins(address, at_once=1)
        finally:
            stopping.stop.clear()
        found, _ = wins(address)
        assert len(requests) == 6
    assert found.tolist() == [1.0, 0.0, 0.5, 0.5]


def test_no_more_requests_are_open_than_allowed():
    open_now, most, lock = [0], [0], threading.Lock()

    def counting(asked):
        with lock:
            open_now[0] += 1
            most[0] = max(most[0], open_now[0])
        threading.Event().wait(0.02)
        with lock:
            open_now[0] -= 1
        return longer(asked)

    with chat_server(counting) as (address, _):
        wins(address, at_once=2)
    assert most[0] == 2
