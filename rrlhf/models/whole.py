"""A causal language model of any make, run whole through its own forward pass; its parts, where training asks for them.

Rows are padded on the right, where nothing sees the padding and every token has the position of its place. What is
wanted of a pass is caught where it goes by: the states that leave a decoder layer, and the last ones, of which the
output matrix reads those that count and no others.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def decoder_layers(network: Any) -> nn.ModuleList:
    """Return a network's decoder layers: the first list of as many modules as its configuration has layers."""
    count = network.config.get_text_config().num_hidden_layers
    lists = (part for part in network.get_decoder().modules() if isinstance(part, nn.ModuleList))
    return next(part for part in lists if len(part) == count)


def final_norm(network: Any) -> nn.Module | None:
    """Return what normalises the last states: the decoder's last part of nothing but vectors; None where none has."""
    parts = [(part, [*part.parameters()]) for part in network.get_decoder().children()]
    norms = [part for part, weights in parts if weights and all(weight.dim() == 1 for weight in weights)]
    return norms[-1] if norms else None


class Pass(NamedTuple):
    """What is wanted of a pass over rows of tokens."""

    logits: Tensor  # [places, vocabulary]
    final: Tensor  # [places, width] that the output matrix read
    states: Tensor | None  # [batch, tokens, width] that enter the layer that was asked for


def run_whole(network: Any, tokens: Tensor, places: tuple[Tensor, Tensor], layer: int | None = None) -> Pass:
    """Run a network on tokens [batch, tokens]; places: row and column of the tokens whose logits are wanted.

    layer: from 1 to the number of layers; at most the states that left the last one, not normalised.
    """
    caught: dict[str, Tensor] = {}

    def choose(_: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        caught["final"] = arguments[0][places]
        return (caught["final"][None],)

    def keep(_: nn.Module, __: Any, left: Any) -> None:
        caught["states"] = left[0] if isinstance(left, tuple) else left

    hooks = [network.get_output_embeddings().register_forward_pre_hook(choose)]
    if layer is not None:
        hooks.append(decoder_layers(network)[layer - 1].register_forward_hook(keep))
    try:
        logits = network(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False).logits
    finally:
        for hook in hooks:
            hook.remove()
    return Pass(logits[0], caught["final"], caught.get("states"))


def recompute(network: Any) -> None:
    """Have every layer run again in the backward pass instead of keeping what it computed, in place."""
    for layer in decoder_layers(network):
        layer.forward = partial(_recomputed, layer.forward)


def _recomputed(forward: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*arguments, **named)
    device = arguments[0].device.type
    # What autocast makes of a layer's weights it would keep for the whole pass.
    with torch.autocast(device, enabled=torch.is_autocast_enabled(device), cache_enabled=False):
        return checkpoint(forward, *arguments, use_reentrant=False, **named)
