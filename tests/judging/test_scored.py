"""A reward model that the user brings as a judge: its scores are those of transformers."""

import pytest
import torch
import transformers
from classifiers import QWEN, saved

from rrlhf.config import Given
from rrlhf.judging.scored import Scorer

PROMPTS = [[{"role": "user", "content": "Say hello."}], [{"role": "user", "content": "Say something longer, please."}]]
SAID = ["Hello.", "This is longer than hello."]


def test_scores_are_the_logits_of_the_conversation_in_its_own_template(model, tmp_path):
    saved(tmp_path, QWEN)
    network = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    limits = {"prompt_tokens": 80, "response_tokens": 48}
    scores = Scorer(Given(base=str(tmp_path), **limits), model, 2).score(PROMPTS, SAID, "judge")
    for prompt, said, score in zip(PROMPTS, SAID, scores.tolist(), strict=True):
        text = tokenizer.apply_chat_template([*prompt, {"role": "assistant", "content": said}], tokenize=False)
        with torch.no_grad():
            read = network(**tokenizer(text, add_special_tokens=False, return_tensors="pt")).logits.item()
        assert score == pytest.approx(read, abs=1e-5)


def test_what_is_cut_for_it_is_told(model, tmp_path, capsys):
    saved(tmp_path, QWEN)
    judge = Scorer(Given(base=str(tmp_path), response_tokens=10), model, 2)
    judge.score(PROMPTS, SAID, "judge")
    assert judge.told().name == str(tmp_path)
    assert "evaluate: judge: 1 of 2 responses cut to 10 tokens (50.0%)" in capsys.readouterr().err
