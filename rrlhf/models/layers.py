"""A language model's layers, run one range at a time through their own modules.

One pass through the frozen lower layers so serves the policy, the reference, the value function and the reward
features. It asks for a decoder of the Llama family's layout (`model.layers`, `model.rotary_emb`, `model.norm`,
`lm_head`), which Llama, Mistral, Qwen and SmolLM share; rrlhf/models/trial.py says whether a model is one.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from rrlhf.models.attention import Packing


class Entered(NamedTuple):
    """States of packed tokens."""

    packing: Packing
    last: Tensor  # [1, tokens, width] that left the last layer, not normalised
    states: dict[int, Tensor]  # [1, tokens, width] that entered each layer that was asked for


def run_layers(network: Any, hidden: Tensor, first: int, last: int, **place: Any) -> Tensor:
    """Run decoder layers first..last-1 on hidden states [batch, tokens, width]; place: as of `through`."""
    return through(network.model.layers[first:last], network.model.rotary_emb, hidden, **place)


def through(
    layers: Any,
    rotary: Any,
    hidden: Tensor,
    *,
    positions: Tensor | None = None,
    cache: Any = None,
    packing: Packing | None = None,
    age: Tensor | None = None,
) -> Tensor:
    """Run these decoder layers. Attention is causal, which is exact for rows padded on the right.

    packing: of hidden states [1, tokens, width]. positions: [batch, 1] and age: of the cache's keys, where each row has
    one new token (`packed_attention`).
    """
    if positions is None:
        positions = packing.positions if packing else torch.arange(hidden.shape[1], device=hidden.device)[None]
    rotation = rotary(hidden, position_ids=positions)
    for layer in layers:
        hidden = layer(
            hidden,
            attention_mask=None,
            position_embeddings=rotation,
            position_ids=positions,
            past_key_values=cache,
            use_cache=cache is not None,
            packing=packing,
            age=age,
        )
    return hidden


def run_through(
    network: Any, hidden: Tensor, last: int, keep: tuple[int, ...], **place: Any
) -> tuple[Tensor, dict[int, Tensor]]:
    """Run the layers below `last`; return the last states, and those that enter the layers `keep`."""
    first, entered = 0, {}
    for layer in sorted({*keep, last}):
        hidden = run_layers(network, hidden, first, layer, **place)
        if layer in keep:
            entered[layer] = hidden
        first = layer
    return hidden, entered


@torch.no_grad()
def prefill(network: Any, rows: list[list[int]], last: int, cache: Any = None, keep: tuple[int, ...] = ()) -> Entered:
    """Run the layers below `last` on rows of tokens; what these begin with in common runs once.

    cache: an empty transformers.Cache for keys and values, which are padded on the right. keep: layers whose entering
    states are wanted.
    """
    tokens, packing = Packing.sharing(rows, network.device)
    hidden = network.model.embed_tokens(tokens[None])
    hidden, entered = run_through(network, hidden, last, keep, cache=cache, packing=packing)
    for held in () if cache is None else cache.layers:
        held.keys, held.values = packing.heads(held.keys), packing.heads(held.values)
    return Entered(packing, hidden, entered)


def hidden_states(network: Any, rows: list[list[int]], layer: int) -> Tensor:
    """Return the states that enter `layer` for rows of tokens, padded on the right, [batch, tokens, width]."""
    found = prefill(network, rows, layer)
    return found.packing.grid(found.last)


def grow(
    network: Any, tokens: Tensor, positions: Tensor, age: Tensor, cache: Any, keep: tuple[int, ...] = ()
) -> tuple[Tensor, dict[int, Tensor]]:
    """Run all layers on one more token for each row, whose keys and values go into the cache.

    tokens, positions: [rows]; age: [rows, keys] as `packed_attention` takes it, the new tokens among the keys. Returns
    the last states [rows, width], not normalised, and those that enter the layers `keep`.
    """
    hidden, last = network.model.embed_tokens(tokens[:, None]), len(network.model.layers)
    hidden, entered = run_through(network, hidden, last, keep, positions=positions[:, None], cache=cache, age=age)
    return hidden[:, 0], {layer: states[:, 0] for layer, states in entered.items()}


def ages(lengths: Tensor, width: int, more: int) -> Tensor:
    """Return how many tokens before its row's first response token each key stands, [batch, width + more].

    The keys are prompts of `lengths` [batch], padded on the right to `width`, and then up to `more` response tokens.
    Padding is far below 0 and stays there when the number of response tokens is added.
    """
    at = torch.arange(width + more, device=lengths.device)
    ago = torch.where(at < width, lengths[:, None] - at, width - at)
    return torch.where((at < width) & (at >= lengths[:, None]), torch.iinfo(torch.int32).min, ago)
