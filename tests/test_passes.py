"""Passes written by hand against transformers' own modules, forwards and backwards."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rrlhf.language_models import passes
from rrlhf.language_models.attention import PACKED, register
from rrlhf.language_models.models import LanguageModel
from rrlhf.policies.policy import PolicyTop

SHAPE = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 7,
}
KINDS = {
    "grouped heads": {},
    "one head width": {"num_key_value_heads": 4},
    "wide heads": {"head_dim": 16},
    "one key head": {"num_key_value_heads": 1, "pad_token_id": None},
    "tied": {"tie_word_embeddings": True},
}


@pytest.fixture(params=KINDS)
def network(request):
    torch.manual_seed(0)
    made = LlamaForCausalLM(LlamaConfig(**SHAPE | KINDS[request.param])).eval()
    for norm in (made.model.norm, made.model.layers[1].input_layernorm, made.model.layers[1].post_attention_layernorm):
        torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
    register()
    made.set_attn_implementation(PACKED)
    return made


def read(top, first, parts=((0, 1, 2),), by_hand=True, layer=2):
    """Return what a policy says of three rows, read in parts, and the gradient of a sum of it by each weight."""
    top._plain = by_hand
    top.zero_grad()
    draw = torch.Generator().manual_seed(1)
    prompts, steps = torch.tensor([5, 2, 9]), torch.tensor([4, 6, 1])
    entering = torch.randint(3, 60, (3, 15), generator=draw)  # token 7 is among them
    entering = entering if first is None else torch.randn(3, 15, 32, generator=draw)
    mask = torch.arange(6) < steps[:, None]
    responses, share = torch.randint(3, 60, (3, 6), generator=draw), torch.randn(2, 3, 6, generator=draw)
    said = []
    for part in map(list, parts):
        found = top.read(entering[part], prompts[part], responses[part], mask[part], layer=layer)
        (found.logprobs * share[0, part] + found.values * share[1, part]).sum().backward()
        said.append(found)
    return said, {name: weight.grad for name, weight in top.named_parameters()}


@pytest.mark.parametrize("first", [None, 0, 1, 2])
def test_by_hand_and_by_modules_policies_say_the_same_and_have_the_same_gradient(network, first):
    top = PolicyTop(LanguageModel(network, None), first).requires_grad_(True)
    torch.nn.init.normal_(top.value.weight)
    assert top._plain
    [ours], gradient = read(top, first)
    [theirs], expected = read(top, first, by_hand=False)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    assert gradient.keys() == expected.keys()
    for name, grad in gradient.items():
        assert (grad - expected[name]).norm() <= 1e-5 * expected[name].norm(), name


@pytest.mark.parametrize(("first", "layer"), [(None, 0), (None, 3), (3, 3)])
def test_states_of_any_layer_can_be_had(network, first, layer):
    top = PolicyTop(LanguageModel(network, None), first).requires_grad_(True)
    [[ours], _], [[theirs], _] = read(top, first, layer=layer), read(top, first, by_hand=False, layer=layer)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("first", [None, 1])
@pytest.mark.parametrize("tokens", [1, 17, 20, 1000])
def test_reading_a_few_tokens_at_a_time_says_the_same(network, first, tokens):
    top = PolicyTop(LanguageModel(network, None), first)
    torch.nn.init.normal_(top.value.weight)
    draw = torch.Generator().manual_seed(1)
    prompts, steps = torch.tensor([5, 2, 9, 4]), torch.tensor([4, 6, 1, 3])
    entering = torch.randint(3, 60, (4, 10), generator=draw)
    entering = entering if first is None else torch.randn(4, 10, 32, generator=draw)
    responses, mask = torch.randint(3, 60, (4, 6), generator=draw), torch.arange(6) < steps[:, None]
    whole, parts = (top.read(entering, prompts, responses, mask, layer=2, tokens=limit) for limit in (None, tokens))
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_attention_that_is_made_again_has_the_same_bits(network, monkeypatch):
    top = PolicyTop(LanguageModel(network, None), None).requires_grad_(True)
    kept = {name: weight.clone() for name, weight in read(top, None)[1].items()}
    monkeypatch.setattr(passes, "KEPT_KEYS", 3)
    again = read(top, None)[1]
    assert all(torch.equal(weight, again[name]) for name, weight in kept.items())


def test_gradients_add_up_over_parts_and_their_memory_is_used_again(network):
    top = PolicyTop(LanguageModel(network, None), None).requires_grad_(True)
    _, whole = read(top, None)
    _, summed = read(top, None, parts=((1,), (0, 2)))
    for name, grad in whole.items():
        torch.testing.assert_close(summed[name], grad, atol=1e-5, rtol=1e-4)
    weight = top.layers[0].mlp.up_proj.weight
    memory, before = weight.grad.data_ptr(), weight.grad.clone()
    top.gradients.clear()
    assert weight.grad is None
    read(top, None, parts=((1,), (0, 2)))
    assert weight.grad.data_ptr() == memory
    assert torch.equal(weight.grad, before)


def test_what_is_frozen_gets_no_gradient(network):
    top = PolicyTop(LanguageModel(network, None), 1).requires_grad_(True)
    top.unembed.requires_grad_(False)
    top.layers[0].mlp.requires_grad_(False)
    _, gradient = read(top, 1)
    frozen = {name for name, weight in top.named_parameters() if not weight.requires_grad}
    assert frozen
    assert all((gradient[name] is None) == (name in frozen) for name in gradient)


def test_the_same_input_gives_the_same_bits(network):
    top = PolicyTop(LanguageModel(network, None), None).requires_grad_(True)
    _, once = read(top, None)
    once = {name: grad.clone() for name, grad in once.items()}
    _, again = read(top, None)
    assert all(torch.equal(grad, again[name]) for name, grad in once.items())


def test_a_module_that_somebody_listens_to_is_called(network):
    top, heard = PolicyTop(LanguageModel(network, None), None), []
    assert passes.stands_in(top)
    top.layers[1].mlp.register_forward_hook(lambda *_: heard.append(1))
    read(top.requires_grad_(True), None)
    assert heard


def test_layers_of_another_make_are_left_to_their_modules(network):
    assert passes.fits(network)
    network.lm_head = torch.nn.Linear(32, 60)
    assert not passes.fits(network)
