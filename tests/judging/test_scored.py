"""A reward model that the user brings as a judge: its scores are those of transformers, and what is none is refused."""

import pytest
import torch
from conftest import classifier

from rrlhf.config import RewardJudge
from rrlhf.judging.scored import Scorer, check_classifier
from rrlhf.located import ParamsError
from rrlhf.models.load import load_base, save_model

PROMPTS = [[{"role": "user", "content": "Say hello."}], [{"role": "user", "content": "Say something longer, please."}]]
SAID = ["Hello.", "This is longer than hello."]


def test_scores_are_the_logits_of_the_conversation_in_its_own_template(model, tmp_path):
    network, tokenizer = classifier(tmp_path)
    judge = Scorer(RewardJudge(base=str(tmp_path)), model)
    for prompt, said, score in zip(PROMPTS, SAID, judge.score(PROMPTS, SAID, "judge").tolist(), strict=True):
        text = tokenizer.apply_chat_template([*prompt, {"role": "assistant", "content": said}], tokenize=False)
        read = tokenizer(text, add_special_tokens=False, return_tensors="pt")
        assert score == pytest.approx(network(**read).logits.item(), abs=1e-6)


def test_without_a_template_the_tokenizer_joins_question_and_answer(model, tmp_path):
    network, tokenizer = classifier(tmp_path)
    tokenizer.chat_template = None
    (tmp_path / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer.save_pretrained(tmp_path)
    [score] = Scorer(RewardJudge(base=str(tmp_path)), model).score(PROMPTS[:1], SAID[:1], "judge").tolist()
    read = tokenizer("Say hello.", "Hello.", return_tensors="pt")
    assert score == pytest.approx(network(**read).logits.item(), abs=1e-6)


def test_the_higher_score_wins_and_equal_answers_tie(model, tmp_path):
    classifier(tmp_path)
    judge = Scorer(RewardJudge(base=str(tmp_path)), model)
    better = judge.score(PROMPTS, SAID, "") > judge.score(PROMPTS, SAID[::-1], "")
    assert torch.equal(judge.wins(PROMPTS, SAID, SAID[::-1], ""), better.double())
    assert judge.wins(PROMPTS, SAID, SAID, "").tolist() == [0.5, 0.5]


def test_what_is_no_reward_model_is_refused(model, tmp_path):
    classifier(tmp_path / "two", num_labels=2)
    save_model(load_base(model), tmp_path / "language")
    (tmp_path / "empty").mkdir()
    for name, told in {
        "two": "LlamaForSequenceClassification with num_labels 2",
        "language": "LlamaForCausalLM with num_labels",
        "empty": "evaluate.judge.base",
        "nowhere": "no such file or folder, and not a hub id",
    }.items():
        with pytest.raises(ParamsError, match=told):
            check_classifier(RewardJudge(base=str(tmp_path / name)))
