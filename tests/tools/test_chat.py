"""Chat on a plain folder: answers, scores, and prompts from everywhere."""

import io
import json
from pathlib import Path

import pytest

from rrlhf.models.text import Texts
from rrlhf.pipeline.params import load_params
from rrlhf.rewards.heads import RewardHeads
from rrlhf.rewards.scoring import RewardModel
from rrlhf.rewards.trunk import Trunk
from rrlhf.tools.chat import Chat, find_models, in_words, prompts
from rrlhf.tools.lineage.lookup import Lookup

ROOT = Path(__file__).parents[2]


@pytest.fixture
def chat(start, rewards, project):
    params = load_params(ROOT, "tiny")
    models, judge, trunk = find_models(Lookup(project, "tiny", params), [str(start / "sft")], None)
    assert judge is None
    opened = Chat([*models, *models], judge, trunk, "cpu")
    named, language = opened.speakers[0]
    trunk = Trunk(language, 1, named.model, Texts(language, named.model))
    opened.ensemble = RewardModel(RewardHeads.load(rewards[1]), (trunk,))
    return opened


def test_every_model_answers_the_same_prompt_with_every_heads_score(chat):
    found = chat.answers("Say a.")
    (score, other) = (answer.pop("score") for answer in found)
    assert found[0] == found[1]
    assert len(found[0]["text"]) <= 12  # characters are its tokens
    assert score["heads"] == pytest.approx(other["heads"], abs=1e-6)  # rows of one batch round differently
    assert len(score["heads"]) == 5
    assert score["mean"] == pytest.approx(sum(score["heads"]) / 5, abs=1e-6)
    assert score["worst"] == min(score["heads"])
    assert in_words({**found[0], "score": score}).count("\n") == 1


def test_the_likeliest_answer_is_always_the_same_and_a_seed_decides_a_sample(chat):
    def said(seed):
        return chat.answers("Say a.", seed)[0]["text"]

    assert said(None) == said(None)
    assert said(3) == said(3)
    assert len({said(seed) for seed in range(4)}) > 1


def test_without_an_ensemble_there_are_no_scores(chat):
    chat.ensemble = None
    found = chat.answers("Say a.")
    assert found[0]["score"] is None
    assert in_words(found[0]) == ""
    json.dumps(found)


def test_a_folder_that_is_no_model_is_named(project, tmp_path):
    with pytest.raises(ValueError, match="not the folder of an artifact"):
        find_models(Lookup(project, "tiny", load_params(ROOT, "tiny")), [str(tmp_path)], None)


def test_a_prompt_is_given_or_read_from_stdin(monkeypatch):
    assert list(prompts(" Say a. ")) == ["Say a."]
    monkeypatch.setattr("sys.stdin", io.StringIO("two\nlines\n"))
    assert list(prompts(None)) == ["two\nlines"]
    for empty in ("", "  \n"):
        with pytest.raises(ValueError, match="empty"):
            prompts(empty)


def test_a_terminal_is_asked_until_its_end(monkeypatch):
    lines = iter(["one", "", "two"])

    def typed(_):
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", typed)
    assert list(prompts(None)) == ["one", "two"]
