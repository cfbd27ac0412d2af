from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rrlhf.judging.perturbations import MARKS, NEUTRAL_SENTENCES, PERTURBATIONS, perturbed

TEXT = st.one_of(
    st.lists(st.sampled_from(["love", "the", "Old", "bridge.", "wait,", "why?", "straße"]), min_size=1).map(" ".join),
    st.text(min_size=1, max_size=40).filter(lambda text: text.strip() != ""),
)
SEEDS = st.integers(0, 1000)


def words_removed(text):
    return "".join(letter for letter in text if letter not in MARKS)


@given(TEXT, st.sampled_from(sorted(PERTURBATIONS)), SEEDS)
def test_every_kind_is_deterministic_and_leaves_something_to_read(text, kind, seed):
    changed = perturbed(text, kind, seed)
    assert changed == perturbed(text, kind, seed)
    assert changed.strip()


@given(TEXT, SEEDS)
def test_every_kind_changes_what_it_says_and_nothing_else(text, seed):
    changed = {kind: perturbed(text, kind, seed) for kind in PERTURBATIONS}
    words = text.split()
    assert Counter(changed["typo"]) == Counter(text)
    assert sum(a != b for a, b in zip(text, changed["typo"], strict=True)) in {0, 2}
    assert changed["case"].casefold() == text.casefold() or not text.isascii()
    assert words_removed(changed["punctuation"]).split() == words_removed(text).split()
    assert changed["punctuation"] != text
    assert changed["whitespace"].split() == words
    assert changed["whitespace"] != text
    assert len(changed["doubled_word"].split()) == len(words) + 1
    assert set(changed["doubled_word"].split()) == set(words)
    assert len(changed["dropped_word"].split()) == max(len(words) - 1, 1)
    assert not Counter(changed["dropped_word"].split()) - Counter(words)
    assert Counter(changed["swapped_words"].split()) == Counter(words)
    assert changed["neutral_sentence"].startswith(text)
    assert changed["neutral_sentence"].endswith(NEUTRAL_SENTENCES)


@pytest.mark.parametrize("kind", PERTURBATIONS)
def test_an_ordinary_sentence_is_changed_in_several_ways(kind):
    text = "The old bridge, loved by many, was rebuilt."
    drawn = {perturbed(text, kind, seed) for seed in range(40)}
    assert text not in drawn
    assert len(drawn) >= 3
