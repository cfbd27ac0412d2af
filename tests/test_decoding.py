"""The quick way to decode against the network itself."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from rrlhf import rollout
from rrlhf.language_models.adapters import adapt, adapters
from rrlhf.language_models.attention import PACKED, Cache, register
from rrlhf.language_models.decoding import Decoder, Product, decodes
from rrlhf.language_models.models import LanguageModel, load_base
from rrlhf.language_models.trial import say_the_same

SHAPE = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "attention_dropout": 0.0,
}
PROMPTS = [[3, 9, 12], [4, 7, 8, 20, 21, 5, 6], [5, 30], [40]]


class Tokenizer:
    eos_token_id = 1


@pytest.fixture(params=["grouped heads", "one head width", "biases", "wide heads"])
def network(request):
    torch.manual_seed(0)
    if request.param == "biases":  # Qwen2's maps to queries, keys and values have some
        made = Qwen2ForCausalLM(Qwen2Config(**SHAPE, use_sliding_window=False))
        for layer in made.model.layers:
            torch.nn.init.normal_(layer.self_attn.q_proj.bias)
            torch.nn.init.normal_(layer.self_attn.v_proj.bias)
    else:
        changed = {"one head width": {"num_key_value_heads": 4}, "wide heads": {"head_dim": 16}}.get(request.param, {})
        made = LlamaForCausalLM(LlamaConfig(**SHAPE | changed))
    register()
    made.set_attn_implementation(PACKED)
    return made.eval().requires_grad_(False)


def drawn(network, keep=(1,), general=False):
    """Sample with the quick way or, as if the network had another make, without."""
    network._rrlhf_decodes = not general
    generator = torch.Generator().manual_seed(0)
    language = LanguageModel(network, Tokenizer())
    return rollout.sample(language, PROMPTS * 3, 8, generator, keep=keep)


def test_both_ways_to_decode_say_the_same(network):
    assert decodes(network)
    quick, general = drawn(network), drawn(network, general=True)
    assert torch.equal(quick.responses, general.responses)
    assert torch.equal(quick.mask, general.mask)
    torch.testing.assert_close(quick.logprobs, general.logprobs, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(quick.states[1], general.states[1], atol=1e-5, rtol=1e-5)
    assert quick.finished.any()  # so that rows left the batch on the way


def test_a_network_of_another_make_decodes_the_general_way(network):
    torch.nn.init.normal_(network.model.layers[0].mlp.down_proj.weight)
    network.model.layers[0].mlp.register_forward_hook(lambda _, __, out: 1.5 * out)
    assert not decodes(network)
    del network._rrlhf_decodes
    network.model.layers[0].mlp.gate_proj = torch.nn.Sequential(network.model.layers[0].mlp.gate_proj)
    assert not decodes(network)


def test_rounding_is_judged_by_the_norm_since_small_numbers_beside_large_ones_carry_their_rounding():
    states = torch.cat([torch.tensor([1.0e4]), torch.randn(31)])
    off = torch.randn(32)
    assert say_the_same(states + 0.5 * off / off.norm(), states)  # small ones are off by a tenth, all by 5e-5
    assert not say_the_same(states * 1.01, states)
    assert not say_the_same(torch.full((3,), torch.nan), torch.ones(3))
    assert not say_the_same(states[:2], states)


def test_adapters_take_part_in_decoding(model):
    network = load_base(model).network.requires_grad_(False)
    plain = drawn(network)
    adapt(network, 1, 3, copies=1, rank=4)
    for module in adapters(network):
        torch.nn.init.normal_(module.up, std=0.3)
    with torch.no_grad():
        quick, general = drawn(network), drawn(network, general=True)
    torch.testing.assert_close(quick.logprobs, general.logprobs, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(quick.logprobs, plain.logprobs, atol=1e-3)


@pytest.mark.parametrize("rows", [1, 3, 8])
def test_a_product_serves_fewer_rows_than_it_was_made_for(rows):
    weight, bias, x = torch.randn(40, 24), torch.randn(40), torch.randn(8, 24)
    torch.testing.assert_close(Product(weight, bias, 8)(x[:rows]), x[:rows] @ weight.T + bias, atol=1e-5, rtol=1e-5)


def test_a_decoder_is_made_anew_for_half_of_the_rows(network):
    decoder = Decoder(network, 8)
    assert decoder.quickest(8, 100) is decoder
    assert decoder.quickest(5, 100) is decoder
    assert decoder.quickest(4, 10) is decoder  # too few steps to repay it
    half = decoder.quickest(4, 100)
    assert (half.rows, decoder.rows) == (4, 8)
    assert half.quickest(3, 100) is half
    assert half.quickest(2, 100).rows == 2


def test_what_does_not_train_is_laid_out_once(network):
    network.model.layers[1].mlp.up_proj.weight.requires_grad_(True)
    first = Decoder(network, 8)
    trained = network.model.layers[1].mlp
    assert trained.gate_proj not in first.frozen.products
    assert {network.lm_head, trained.down_proj} <= first.frozen.products.keys()
    with torch.no_grad():
        trained.up_proj.weight.add_(0.1)
    again = Decoder(network, 8, laid_out=first.frozen)
    assert again.frozen.products == first.frozen.products
    state = torch.randn(8, 32)
    at, bias = torch.zeros(4, dtype=torch.long), torch.zeros(4, 1)
    expected = Decoder(network, 8).step(state[:4], at, bias, Cache(2, 1), ())[0]
    for one in (again, Decoder(network, 4, laid_out=first.frozen)):
        found = one.step(state[:4], at, bias, Cache(2, 1), ())[0]
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
