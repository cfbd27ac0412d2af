"""Layers run on whole prompts or texts at once, without gradients; what these begin with in common runs once."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from rrlhf.language_models.attention import Cache, Filling, Packing
from rrlhf.language_models.models import LanguageModel, embed, run_layers
from rrlhf.language_models.passes import Stack, fits, stands_in

MOST_WEIGHTS = 2**26  # attention weights of a layer up to which passes.py, which holds them all, runs it


class Entered(NamedTuple):
    """States of packed tokens."""

    packing: Packing
    last: Tensor  # [1, tokens, width] that left the last layer, not normalised
    states: dict[int, Tensor]  # [1, tokens, width] that entered each layer that was asked for


@torch.no_grad()
def prefill(
    language: LanguageModel, rows: list[list[int]], last: int, cache: Cache | None = None, keep: tuple[int, ...] = ()
) -> Entered:
    """Run the layers below `last` on rows of tokens and put keys and values into a cache, padded on the right.

    keep: layers whose entering states are wanted.
    """
    network = language.network
    tokens, packing = Packing.sharing(rows, language.device)
    hidden = embed(network, tokens[None])
    weights = packing.batch * packing.width**2 * network.config.num_attention_heads
    if last and weights <= MOST_WEIGHTS and stands_in(network.model) and fits(network):
        stack = Stack(None, network.model.rotary_emb, network.model.layers[:last])
        hidden, entered = stack.fill(hidden[0], packing, cache, keep)
        return Entered(packing, hidden[None], {layer: states[None] for layer, states in entered.items()})
    filling = None if cache is None else Filling(cache, packing)
    place: dict[str, Any] = {"positions": packing.positions, "cache": filling, "packing": packing}
    hidden, entered = run_through(network, hidden, last, keep, **place)
    return Entered(packing, hidden, entered)


def run_through(
    network: Any, hidden: Tensor, last: int, keep: tuple[int, ...], **place: Any
) -> tuple[Tensor, dict[int, Tensor]]:
    """Run the layers below `last`; return the last states, and those that enter the layers `keep`.

    place: as of `run_layers`.
    """
    first, entered = 0, {}
    for layer in sorted({*keep, last}):
        hidden = run_layers(network, hidden, first, layer, **place)
        if layer in keep:
            entered[layer] = hidden
        first = layer
    return hidden, entered


def hidden_states(language: LanguageModel, rows: list[list[int]], layer: int) -> Tensor:
    """Return the states that enter `layer` for rows of tokens, padded on the right, [batch, tokens, width]."""
    found = prefill(language, rows, layer)
    return found.packing.grid(found.last)
