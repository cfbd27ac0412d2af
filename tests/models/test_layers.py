"""Layers run together, packed, by range and a token at a time: what the model's own forward gives each row alone."""

import re

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from rrlhf.models.layers import PACKED, hidden_states, prefill, register, run_layers
from rrlhf.models.load import LanguageModel, load_base
from rrlhf.models.rollout import sample
from rrlhf.models.top import PolicyTop
from rrlhf.models.trial import refusal

ROWS = st.lists(st.lists(st.integers(3, 5), min_size=1, max_size=7), min_size=1, max_size=5)
SHAPE = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": 1,
}
WINDOW = 5
MAKES = {
    "Llama": transformers.LlamaConfig(**SHAPE),
    "one key head": transformers.LlamaConfig(**{**SHAPE, "num_key_value_heads": 1}),
    "wide heads": transformers.LlamaConfig(**SHAPE, head_dim=16),
    "tied": transformers.LlamaConfig(**SHAPE, tie_word_embeddings=True),
    "Qwen 2 with biases": transformers.Qwen2Config(**SHAPE),
    "Qwen 3": transformers.Qwen3Config(**SHAPE, head_dim=16),
    "Mistral with a sliding window": transformers.MistralConfig(**SHAPE, sliding_window=WINDOW),
    "Phi 3 with a sliding window": transformers.Phi3Config(**SHAPE, sliding_window=WINDOW),
    "Qwen 2 with windows in some layers": transformers.Qwen2Config(
        **SHAPE, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1
    ),
    "OLMo 2": transformers.Olmo2Config(**SHAPE),
    "SmolLM 3": transformers.SmolLM3Config(**SHAPE),
    "Mixtral": transformers.MixtralConfig(**SHAPE, num_local_experts=4, num_experts_per_tok=2, sliding_window=None),
}
LENGTHS = [WINDOW - 2, WINDOW, WINDOW + 1, 4 * WINDOW]  # below, at and beyond the window


@pytest.fixture(scope="module")
def language(model):
    return load_base(model)


def made(name):
    """Return a random network with its own attention, and the same one as rrlhf runs it."""
    torch.manual_seed(0)
    own = transformers.AutoModelForCausalLM.from_config(MAKES[name]).eval()
    for weight in own.parameters():
        torch.nn.init.normal_(weight, *((0.0, weight.shape[-1] ** -0.5) if weight.dim() > 1 else (0.7, 0.2)))
    own.requires_grad_(False)
    ours = transformers.AutoModelForCausalLM.from_config(MAKES[name]).eval().requires_grad_(False)
    ours.load_state_dict(own.state_dict())
    register()
    ours.set_attn_implementation(PACKED)
    ours.generation_config.eos_token_id = [1]
    return own, ours


def rows_of(lengths, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 60, (length,), generator=draw).tolist() for length in lengths]


@pytest.mark.parametrize("name", MAKES)
def test_a_make_that_is_allowed_says_what_its_own_forward_does_in_any_batch(name):
    own, ours = made(name)
    assert refusal(own.config, 40) is None
    rows = rows_of(LENGTHS)
    found = prefill(ours, rows, 3)
    logits = ours.lm_head(ours.model.norm(found.packing.grid(found.last)))
    for row, said in zip(rows, logits, strict=True):
        torch.testing.assert_close(said[: len(row)], own(torch.tensor([row])).logits[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", MAKES)
def test_samples_and_what_training_reads_of_them_have_its_own_log_probabilities(name):
    own, ours = made(name)
    language, prompts = LanguageModel(ours, None), rows_of(LENGTHS)
    drawn = sample(language, prompts, 12, torch.Generator().manual_seed(1), keep=(1,))
    read, _ = PolicyTop(language, 1)(drawn.states[1], drawn.prompt_lengths, drawn.responses, drawn.mask)
    for number, prompt in enumerate(prompts):
        said = drawn.lists()[number]
        logits = own(torch.tensor([prompt + said])).logits[0, len(prompt) - 1 : -1]
        alone = logits.log_softmax(-1).gather(1, torch.tensor(said)[:, None])[:, 0]
        torch.testing.assert_close(drawn.logprobs[number, : len(said)], alone, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(read[number, : len(said)], alone, atol=1e-4, rtol=1e-4)


REFUSED = {
    "capped scores": (transformers.Gemma2Config(**SHAPE, head_dim=8), 40, "gemma2"),
    "an embedding for every kind of layer": (transformers.Gemma3TextConfig(**SHAPE, head_dim=8), 40, "gemma3_text"),
    "multipliers": (transformers.GraniteConfig(**SHAPE, embedding_multiplier=3.0), 40, "granite"),
    "another layout": (
        transformers.GPTNeoXConfig(hidden_size=32, num_attention_heads=4, num_hidden_layers=1),
        40,
        "neox",
    ),
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
def test_a_make_that_would_say_something_else_is_refused_by_name(name):
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
    states = hidden_states(language.network, rows, 0)
    assert states.shape[:2] == (2, 3)
    for number, row in enumerate(rows):
        assert torch.equal(states[number, : len(row)], language.network.model.embed_tokens(torch.tensor(row)))


def test_a_prompt_is_answered_several_times_as_if_each_stood_alone(language):
    rows, network = [[3, 9, 12, 7]] * 3 + [[3, 9, 4]], language.network
    drawn = sample(language, rows, 6, torch.Generator().manual_seed(1), keep=(1,))
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
