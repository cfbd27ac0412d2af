"""Rows that run together, their common beginnings once: what each row alone gives, by hand and by modules."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rrlhf.language_models import prefill as module
from rrlhf.language_models.attention import Cache
from rrlhf.language_models.models import embed, load_base, run_layers
from rrlhf.language_models.prefill import hidden_states, prefill
from rrlhf.rollout import sample

ROWS = st.lists(st.lists(st.integers(3, 5), min_size=1, max_size=7), min_size=1, max_size=5)
WAYS = {"by hand": module.MOST_WEIGHTS, "by modules": -1}


@pytest.fixture(scope="module")
def language(model):
    return load_base(model)


@pytest.mark.parametrize("way", WAYS)
@given(ROWS)
@settings(max_examples=30, deadline=None)
def test_states_keys_and_values_are_those_of_each_row_alone(language, way, rows):
    """`run_layers` on one row shares nothing and packs nothing."""
    cache = Cache(language.layers, 9)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "MOST_WEIGHTS", WAYS[way])
        found = prefill(language, rows, language.layers, cache, (0, 1))
    for number, row in enumerate(rows):
        for layer, states in {**found.states, language.layers: found.last}.items():
            with torch.no_grad():
                alone = run_layers(language.network, embed(language.network, torch.tensor([row])), 0, layer)
            theirs = found.packing.grid(states)[number, : len(row)]
            torch.testing.assert_close(theirs, alone[0], atol=1e-5, rtol=1e-5)
        single = Cache(language.layers, 9)
        with torch.no_grad():
            run_layers(language.network, embed(language.network, torch.tensor([row])), 0, language.layers, cache=single)
        for layer in range(language.layers):
            keys, expected = cache.keys[layer][number, ..., : len(row)], single.keys[layer][0, ..., : len(row)]
            torch.testing.assert_close(keys, expected, atol=1e-5, rtol=1e-5)
            values, expected = cache.values[layer][number, :, : len(row)], single.values[layer][0, :, : len(row)]
            torch.testing.assert_close(values, expected, atol=1e-5, rtol=1e-5)


def test_states_below_the_first_layer_are_the_embeddings(language):
    rows = [[3, 4], [3, 5, 6]]
    states = hidden_states(language, rows, 0)
    assert states.shape[:2] == (2, 3)
    for number, row in enumerate(rows):
        assert torch.equal(states[number, : len(row)], embed(language.network, torch.tensor(row)))


def test_a_prompt_is_answered_several_times_as_if_each_stood_alone(language):
    rows = [[3, 9, 12, 7]] * 3 + [[3, 9, 4]]
    drawn = sample(language, rows, 6, torch.Generator().manual_seed(1), keep=(1,))
    for number, prompt in enumerate(rows):
        tokens = prompt + drawn.lists()[number]
        with torch.no_grad():
            logits = language.network(torch.tensor([tokens])).logits[0, len(prompt) - 1 : -1]
            below = run_layers(language.network, embed(language.network, torch.tensor([tokens])), 0, 1)[0]
        alone = logits.log_softmax(-1).gather(1, torch.tensor(tokens[len(prompt) :])[:, None])[:, 0]
        torch.testing.assert_close(drawn.logprobs[number, : len(alone)], alone, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(drawn.states[1][number, : len(tokens)], below, atol=1e-5, rtol=1e-4)
