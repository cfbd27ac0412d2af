"""Formulas written by hand, forwards and backwards, against autograd in float64."""

import pytest
import torch
from torch.nn.functional import cross_entropy, scaled_dot_product_attention, silu

from rrlhf.language_models import kernels


def drawn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def by_autograd(function, g, *inputs):
    """Return a function's result and its gradients by its inputs."""
    inputs = [one.clone().requires_grad_() for one in inputs]
    result = function(*inputs)
    return result.detach(), torch.autograd.grad(result, inputs, g)


def close(found, expected):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_norm_and_its_gradients_equal_autograds(seed):
    x, weight, g = drawn(5, 8, seed=seed), drawn(8, seed=seed + 3), drawn(5, 8, seed=seed + 6)

    def definition(x, weight):
        return weight * x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()

    expected, gradients = by_autograd(definition, g, x, weight)
    found, scale = kernels.rms_norm(x, weight, 1e-5)
    close([found], [expected])
    close(kernels.rms_norm_backward(g.clone(), x * scale, scale, weight), gradients)


def test_a_rotation_turns_pairs_by_their_angle_and_back():
    x, angle = drawn(3, 2, 6), drawn(3, 1, 3)
    cosine, sine = (torch.cat([part, part], dim=-1) for part in (angle.cos(), angle.sin()))
    turned = kernels.rotate(x, cosine, sine)
    pairs = torch.complex(x[..., :3], x[..., 3:]) * torch.polar(torch.ones_like(angle), angle)
    close([turned], [torch.cat([pairs.real, pairs.imag], dim=-1)])
    close([kernels.rotate(turned, cosine, sine, -1)], [x])


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_attention_and_its_gradients_equal_autograds(seed):
    queries, keys, values, g = (drawn(4, width, 6, seed=seed + width) for width in (3, 5, 5, 3))
    bias = torch.zeros(4, 3, 5, dtype=torch.float64).masked_fill(torch.ones(3, 5).triu(3).bool(), -torch.inf)

    def definition(queries, keys, values):
        return scaled_dot_product_attention(queries, keys, values, attn_mask=bias, scale=1.0)

    expected, gradients = by_autograd(definition, g, queries, keys, values)
    attended, weights = kernels.attend(queries, keys, values, bias)
    close([attended], [expected])
    close(kernels.attend_backward(g, queries, keys, values, weights), gradients)


def test_the_gate_and_its_gradients_equal_autograds():
    gate, up, g = drawn(5, 7), drawn(5, 7, seed=1), drawn(5, 7, seed=2)
    expected, gradients = by_autograd(lambda gate, up: silu(gate) * up, g, gate, up)
    result, share, opened = kernels.gated(gate.clone(), up)
    close([result], [expected])
    close(kernels.gated_backward(g.clone(), share, opened, up), gradients)


def test_log_probabilities_and_their_gradient_equal_autograds():
    logits, chosen, g = drawn(6, 9), torch.tensor([0, 3, 8, 8, 1, 5]), drawn(6, seed=1)
    expected, gradients = by_autograd(lambda logits: -cross_entropy(logits, chosen, reduction="none"), g, logits)
    found, every = kernels.chosen_logprobs(logits, chosen)
    close([found], [expected])
    close([kernels.chosen_logprobs_backward(g, every, chosen)], gradients)
