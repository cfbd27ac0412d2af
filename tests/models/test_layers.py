"""Layers run together, packed, by range and a token at a time: what the model's own forward gives each row alone."""

import re

import pytest
import torch
import transformers
from conftest import TINY
from hypothesis import given, settings
from hypothesis import strategies as st

from rrlhf.models.layers import prefill, run_layers
from rrlhf.models.load import load_base
from rrlhf.models.rollout import Draws, sample
from rrlhf.models.states import hidden_states
from rrlhf.models.top import PolicyTop
from rrlhf.models.trial import refusal

ROWS = st.lists(st.lists(st.integers(3, 5), min_size=1, max_size=7), min_size=1, max_size=5)
SHAPE = {**TINY, "vocab_size": 60, "pad_token_id": None, "bos_token_id": None, "eos_token_id": 1}


@pytest.fixture(scope="module")
def language(model):
    return load_base(model)


REFUSED = {
    "a short context": (transformers.LlamaConfig(**SHAPE), 129, "made for 128 tokens"),
    "embeddings by the longest row": (
        transformers.LlamaConfig(
            **{**SHAPE, "max_position_embeddings": 16},
            rope_parameters={"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4},
        ),
        17,
        "made for 16 tokens",
    ),
    "two embeddings": (
        transformers.Phi3Config(
            **SHAPE,
            original_max_position_embeddings=16,
            rope_parameters={
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "short_factor": [1.0] * 4,
                "long_factor": [4.0] * 4,
                "original_max_position_embeddings": 16,
            },
        ),
        17,
        r"rotary embedding \(longrope\) changes for a whole batch when one row is longer than 16",
    ),
}


@pytest.mark.filterwarnings("ignore:.*original_max_position_embeddings")
@pytest.mark.parametrize("name", REFUSED)
def test_rows_that_are_too_long_for_a_model_are_refused(name):
    config, tokens, told = REFUSED[name]
    assert re.search(told, refusal(config, tokens) or "")


@pytest.mark.filterwarnings("ignore:.*original_max_position_embeddings")
def test_below_its_limit_an_embedding_that_changes_is_allowed():
    for name in ("embeddings by the longest row", "two embeddings"):
        assert refusal(REFUSED[name][0], 16) is None


@given(ROWS)
@settings(max_examples=30, deadline=None)
def test_states_keys_and_values_are_those_of_each_row_alone(language, rows):
    """`run_layers` on one row shares nothing and packs nothing."""
    network, cache = language.network, transformers.DynamicCache()
    found = prefill(network, rows, language.layers, cache, (0, 1))
    for number, row in enumerate(rows):
        for layer, states in {**found.states, language.layers: found.last}.items():
            with torch.no_grad():
                alone = run_layers(network, network.model.embed_tokens(torch.tensor([row])), 0, layer)
            theirs = found.packing.grid(states)[number, : len(row)]
            torch.testing.assert_close(theirs, alone[0], atol=1e-5, rtol=1e-5)
        single = transformers.DynamicCache()
        with torch.no_grad():
            run_layers(network, network.model.embed_tokens(torch.tensor([row])), 0, language.layers, cache=single)
        for layer in range(language.layers):
            ours, theirs = cache.layers[layer], single.layers[layer]
            torch.testing.assert_close(ours.keys[number, :, : len(row)], theirs.keys[0], atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(ours.values[number, :, : len(row)], theirs.values[0], atol=1e-5, rtol=1e-5)


def test_states_below_the_first_layer_are_the_embeddings(language):
    rows = [[3, 4], [3, 5, 6]]
    states = hidden_states(language, rows, 0)
    assert states.shape[:2] == (2, 3)
    for number, row in enumerate(rows):
        assert torch.equal(states[number, : len(row)], language.network.model.embed_tokens(torch.tensor(row)))


def test_a_prompt_is_answered_several_times_as_if_each_stood_alone(language):
    rows, network = [[3, 9, 12, 7]] * 3 + [[3, 9, 4]], language.network
    drawn = sample(language, rows, 6, Draws(torch.Generator().manual_seed(1)), keep=(1,))
    for number, prompt in enumerate(rows):
        tokens = prompt + drawn.lists()[number]
        with torch.no_grad():
            logits = network(torch.tensor([tokens])).logits[0, len(prompt) - 1 : -1]
            below = run_layers(network, network.model.embed_tokens(torch.tensor([tokens])), 0, 1)[0]
        alone = logits.log_softmax(-1).gather(1, torch.tensor(tokens[len(prompt) :])[:, None])[:, 0]
        torch.testing.assert_close(drawn.logprobs[number, : len(alone)], alone, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(drawn.states[1][number, : len(tokens)], below, atol=1e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("first", [None, 1])
@pytest.mark.parametrize("tokens", [1, 17, 20, 1000])
def test_reading_a_few_tokens_at_a_time_says_the_same(language, first, tokens):
    top = PolicyTop(language, first)
    torch.nn.init.normal_(top.value.weight)
    draw = torch.Generator().manual_seed(1)
    prompts, steps = torch.tensor([5, 2, 9, 4]), torch.tensor([4, 6, 1, 3])
    entering = torch.randint(3, 60, (4, 10), generator=draw)
    entering = entering if first is None else torch.randn(4, 10, 32, generator=draw)
    responses, mask = torch.randint(3, 60, (4, 6), generator=draw), torch.arange(6) < steps[:, None]
    whole, parts = (top.read(entering, prompts, responses, mask, layer=2, tokens=limit) for limit in (None, tokens))
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("first", "layer"), [(None, 0), (None, 3), (3, 3), (1, 1), (1, 2)])
def test_states_of_any_layer_can_be_had(language, first, layer):
    tokens, network = torch.tensor([[3, 9, 12, 7, 5]]), language.network
    with torch.no_grad():
        entering = tokens if first is None else run_layers(network, network.model.embed_tokens(tokens), 0, first)
        read = PolicyTop(language, first).read(
            entering, torch.tensor([3]), tokens[:, 3:], torch.ones(1, 2).bool(), layer=layer
        )
        expected = run_layers(network, network.model.embed_tokens(tokens), 0, layer)
    torch.testing.assert_close(read.states, expected, atol=1e-5, rtol=1e-5)
