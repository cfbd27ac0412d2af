"""A Llama-like decoder forwards and backwards by hand, in float32 on a processor, rows of tokens laid end to end.

Autograd keeps what every operation read and walks through memory once for each. Here a layer keeps only what its
backward pass cannot cheaply make again, few operations walk through memory, and products of weights' gradients are
added to the gradients themselves. Every backward formula stands beside its forward one; g is the loss's gradient by a
function's result. rrlhf/language_models/passes.py runs layers of these.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """Return w x / rms(x) and 1 / rms(x) [tokens, 1], rms(x)^2 = mean(x^2) + epsilon (Zhang and Sennrich 2019)."""
    square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1])
    scale = square.add_(epsilon).rsqrt_()
    return (x * scale).mul_(weight), scale


def rms_norm_backward(g: Tensor, n: Tensor, scale: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients by x and by the weight, with n = x / rms(x) and scale = 1 / rms(x); g is used up.

    d/dw = sum of g n over tokens; as dn/dx = (1 - n n' / width) / rms(x), d/dx = (g w - n mean(g w n)) / rms(x).
    """
    along = g * n
    by_weight = along.sum(0)
    mean = torch.mv(along, weight).div_(-n.shape[-1])[:, None]
    return g.mul_(weight).addcmul_(n, mean).mul_(scale), by_weight


def rotate(x: Tensor, cosine: Tensor, sine: Tensor, direction: int = 1) -> Tensor:
    """Turn each pair (first half, second half) of [tokens, heads, width] by its token's angle [tokens, 1, width].

    Rotary positions (Su et al. 2021, arXiv 2104.09864, eq. 34), in Llama's order. A rotation's transpose is the
    rotation back, so direction -1 is the backward pass.
    """
    half = x.shape[-1] // 2
    turned = x * cosine
    turned[..., :half].addcmul_(x[..., half:], sine[..., :half], value=-direction)
    turned[..., half:].addcmul_(x[..., :half], sine[..., half:], value=direction)
    return turned


class Attended(NamedTuple):
    """Attention's result and what its backward pass needs."""

    result: Tensor  # [rows and groups, queries, head width]
    weights: Tensor  # [rows and groups, queries, keys]


def attend(queries: Tensor, keys: Tensor, values: Tensor, bias: Tensor) -> Attended:
    """Return P V with P = softmax(Q K' + bias); queries come scaled, bias is 0 or -inf, like P in shape."""
    weights = torch.baddbmm(bias, queries, keys.transpose(1, 2)).softmax(dim=-1)
    return Attended(torch.bmm(weights, values), weights)


def attend_backward(
    g: Tensor, queries: Tensor, keys: Tensor, values: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients by queries, keys and values.

    d/dV = P' g; with G = g V' the gradient by P, that by the softmax's argument is S = P (G - sum over keys of P G);
    d/dQ = S K and d/dK = S' Q.
    """
    by_weights = torch.bmm(g, values.transpose(1, 2))
    by_scores = torch._softmax_backward_data(by_weights, weights, -1, weights.dtype)
    by_values = torch.bmm(weights.transpose(1, 2), g)
    return torch.bmm(by_scores, keys), torch.bmm(by_scores.transpose(1, 2), queries), by_values


class Gated(NamedTuple):
    """silu(gate) * up and what its backward pass needs."""

    result: Tensor
    share: Tensor  # sigmoid(gate)
    opened: Tensor  # silu(gate)


def gated(gate: Tensor, up: Tensor) -> Gated:
    """Return silu(gate) * up, silu(x) = x sigmoid(x) (SwiGLU, Shazeer 2020, arXiv 2002.05202); gate is used up."""
    share = gate.sigmoid()
    opened = gate.mul_(share)
    return Gated(opened * up, share, opened)


def gated_backward(g: Tensor, share: Tensor, opened: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients by gate and up; g is used up.

    d/dup = g silu(gate); d/dgate = g up silu'(gate), silu' = s + x s (1 - s) = s + silu - s silu with s = sigmoid(x).
    """
    by_up = g * opened
    slope = (share + opened).addcmul_(share, opened, value=-1)
    return g.mul_(up).mul_(slope), by_up


def chosen_logprobs(logits: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Return log softmax(logits) at the chosen index of each row, and all of them [rows, vocabulary]."""
    logprobs = logits.log_softmax(dim=-1)
    return logprobs.gather(1, chosen[:, None])[:, 0], logprobs


def chosen_logprobs_backward(g: Tensor, logprobs: Tensor, chosen: Tensor) -> Tensor:
    """Return the gradient by the logits, g (1 - softmax at the chosen one, -softmax elsewhere), in logprobs' place."""
    by_logits = logprobs.exp_().mul_(-g[:, None])
    return by_logits.scatter_add_(1, chosen[:, None], g[:, None])
