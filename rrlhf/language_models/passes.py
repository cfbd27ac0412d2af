"""A Llama-like decoder forwards and backwards: layers, and in training what stands around them.

Does what transformers' modules do, with the formulas of rrlhf/language_models/kernels.py. The last layer works for the
tokens that are asked for only: nobody reads its other states. `fits` and `stands_in` say where all this can take the
modules' place: plain layers in float32 on a processor, in one process.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rrlhf.language_models.attention import Asked, Cache, Packing, Place, Side
from rrlhf.language_models.decoding import decodes
from rrlhf.language_models.gradients import Gradients
from rrlhf.language_models.kernels import (
    attend,
    attend_backward,
    chosen_logprobs,
    chosen_logprobs_backward,
    gated,
    gated_backward,
    rms_norm,
    rms_norm_backward,
    rotate,
)

KEPT_KEYS = 128  # a row's tokens up to which attention's weights, tokens squared, are kept for the backward pass
MAPS = [f"self_attn.{name}_proj" for name in ("q", "k", "v", "o")] + [
    f"mlp.{name}_proj" for name in ("gate", "up", "down")
]


def fits(network: Any) -> bool:
    """Whether a network's layers are of the kind that stands here, and where it does."""
    if network.device.type != "cpu" or network.config.hidden_act != "silu":
        return False
    try:
        maps = [layer.get_submodule(name) for layer in network.model.layers for name in MAPS]
    except AttributeError:  # layers of another make
        return False
    plain = all(type(one) is nn.Linear and one.bias is None for one in [*maps, network.lm_head])
    return plain and decodes(network)


def stands_in(top: nn.Module) -> bool:
    """Whether it may be used now: nobody waits for other precision, a module's call, or autograd's gradients."""
    hooked = any(module._forward_hooks or module._forward_pre_hooks for module in top.modules())
    return not (hooked or torch.is_autocast_enabled("cpu") or torch.distributed.is_initialized())


class Kept(NamedTuple):
    """What a layer's backward pass needs of its forward pass."""

    x: Tensor  # [tokens, width]
    scale: Tensor  # of the first norm
    queries: Tensor
    keys: Tensor
    values: Tensor
    weights: Tensor | None  # attention's; None: they are to be made again
    attended: Tensor  # [asked tokens, heads * head width]
    middle: Tensor  # [asked tokens, width] states between attention and the feed-forward part
    middle_scale: Tensor  # of the second norm
    up: Tensor  # [asked tokens, feed-forward width]
    share: Tensor  # of the gate
    opened: Tensor


class Layer:
    """One decoder layer; asked tokens are those of `place.asked`."""

    def __init__(self, module: Any, gradients: Gradients) -> None:
        attention, mlp = module.self_attn, module.mlp
        self.norm, self.second_norm = module.input_layernorm, module.post_attention_layernorm
        self.query, self.key, self.value = (
            one.weight for one in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        self.output, self.gate, self.up, self.down = (
            one.weight for one in (attention.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj)
        )
        self.width, self._gradients = attention.head_dim, gradients

    @property
    def weights(self) -> list[Tensor]:
        """All of them."""
        maps = [self.query, self.key, self.value, self.output, self.gate, self.up, self.down]
        return [*maps, self.norm.weight, self.second_norm.weight]

    def forward(self, x: Tensor, place: Place) -> tuple[Tensor, Kept]:
        """Map states [tokens, width] to those of the asked tokens."""
        n, scale = rms_norm(x, self.norm.weight, self.norm.variance_epsilon)
        asked = n if place.asked is None else n[place.asked]
        query, key, value = (
            self._heads(states @ weight.t()) for states, weight in ((asked, self.query), (n, self.key), (n, self.value))
        )
        blocks = len(place.bias)
        queries = place.queries.seated(rotate(query, place.queries.cosine, place.queries.sine), blocks)
        keys = place.keys.seated(rotate(key, place.keys.cosine, place.keys.sine), blocks)
        values = place.keys.seated(value, blocks)
        grid, weights = attend(queries, keys, values, place.bias)
        attended = place.queries.packed(grid).flatten(1)
        middle = torch.addmm(x if place.asked is None else x[place.asked], attended, self.output.t())
        second, middle_scale = rms_norm(middle, self.second_norm.weight, self.second_norm.variance_epsilon)
        up = second @ self.up.t()
        result, share, opened = gated(second @ self.gate.t(), up)
        after = torch.addmm(middle, result, self.down.t())
        heads = (queries, keys, values, weights if weights.shape[-1] <= KEPT_KEYS else None, attended)
        return after, Kept(x, scale, *heads, middle, middle_scale, up, share, opened)

    def backward(self, g: Tensor, kept: Kept, place: Place) -> Tensor:
        """Add to the weights' gradients; return the gradient by the states that entered; g is used up."""
        add, middle = self._gradients, self._backward_mlp(g, kept)
        add.product(self.output, middle, kept.attended)
        query, key, value = self._backward_attention(middle @ self.output, kept, place)
        normal = kept.x * kept.scale
        n = normal * self.norm.weight
        add.product(self.query, query, n if place.asked is None else n[place.asked])
        add.product(self.key, key, n)
        add.product(self.value, value, n)
        by_norm = (key @ self.key).addmm_(value, self.value)
        if place.asked is None:
            by_norm.addmm_(query, self.query)
        else:
            by_norm.index_add_(0, place.asked, query @ self.query)
        by_x, by_weight = rms_norm_backward(by_norm, normal, kept.scale, self.norm.weight)
        add.sum(self.norm.weight, by_weight)
        return by_x.add_(middle) if place.asked is None else by_x.index_add_(0, place.asked, middle)

    def _backward_mlp(self, g: Tensor, kept: Kept) -> Tensor:
        add = self._gradients
        add.product(self.down, g, kept.opened * kept.up)
        by_gate, by_up = gated_backward(g @ self.down, kept.share, kept.opened, kept.up)
        normal = kept.middle * kept.middle_scale
        second = normal * self.second_norm.weight
        add.product(self.gate, by_gate, second)
        add.product(self.up, by_up, second)
        by_second = (by_gate @ self.gate).addmm_(by_up, self.up)
        by_middle, by_weight = rms_norm_backward(by_second, normal, kept.middle_scale, self.second_norm.weight)
        add.sum(self.second_norm.weight, by_weight)
        return by_middle.add_(g)

    def _backward_attention(self, g: Tensor, kept: Kept, place: Place) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients by what the maps to queries, keys and values gave."""
        grid = place.queries.seated_or_zero(self._heads(g), len(place.bias))
        given, weights = (kept.queries, kept.keys, kept.values), kept.weights
        if weights is None:
            weights = attend(*given, place.bias).weights
        by_queries, by_keys, by_values = attend_backward(grid, *given, weights)
        query = rotate(place.queries.packed(by_queries), place.queries.cosine, place.queries.sine, -1)
        key = rotate(place.keys.packed(by_keys), place.keys.cosine, place.keys.sine, -1)
        return query.flatten(1), key.flatten(1), place.keys.packed(by_values).flatten(1)

    def _heads(self, states: Tensor) -> Tensor:
        return states.view(len(states), -1, self.width)


class Reading(NamedTuple):
    """What a stack says about the asked tokens."""

    logprobs: Tensor  # [asked tokens] of the tokens that were chosen behind them
    final: Tensor  # [asked tokens, width] normalised last states
    states: Tensor | None  # [tokens, width] that enter the layer that was asked for


class Stack:
    """Layers from some layer on, with the embeddings below them where they are all, and the readout above."""

    def __init__(
        self, embed: Any, rotary: Any, layers: Any, norm: Any = None, unembed: Any = None, gradients: Any = None
    ) -> None:
        self.embed, self.rotary, self.norm, self.unembed = embed, rotary, norm, unembed
        self.layers = [Layer(layer, gradients) for layer in layers]
        self.gradients = gradients

    def places(self, packing: Packing, asked: Asked | None) -> list[Place]:
        """Return each layer's place; the last layer's queries are the asked tokens only, where some are named."""
        some, batch, position = self.layers[0], packing.batch, packing.positions[0]
        own = packing.places // packing.width
        heads, groups = len(some.query) // some.width, len(some.key) // some.width
        cosine, sine = (part[0] for part in self.rotary(some.norm.weight, position[None]))
        keys = Side.of(own, position, position, batch, groups, (cosine, sine), packing.source)
        cosine, sine = (part * some.width**-0.5 for part in (cosine, sine))  # queries come scaled
        places = []
        if asked is None or len(self.layers) > 1:
            whole = Side.of(own, position, position, batch, heads, (cosine, sine))
            places = [Place.of(keys, whole, None, groups)] * (len(self.layers) - (asked is not None))
        if asked is not None:
            turn = (cosine[asked.at], sine[asked.at])
            last = Side.of(asked.row, asked.step, position[asked.at], batch, heads, turn)
            places.append(Place.of(keys, last, asked.at, groups))
        return places

    def fill(
        self, hidden: Tensor, packing: Packing, cache: Cache | None, keep: tuple[int, ...]
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Run the layers on packed states [tokens, width] and put their keys and values into a cache, if there is one.

        Returns the last states, not normalised, and those that enter the layers `keep`.
        """
        entered = {}
        for number, (layer, place) in enumerate(zip(self.layers, self.places(packing, None), strict=True)):
            entered[number] = hidden
            hidden, kept = layer.forward(hidden, place)
            if cache is not None:
                cache.update(*(states.unflatten(0, (packing.batch, -1)) for states in (kept.keys, kept.values)), number)
            del kept
        entered[len(self.layers)] = hidden
        return hidden, {number: entered[number] for number in keep}

    def read(self, entering: Tensor, places: list[Place], chosen: Tensor, layer: int | None = None) -> Reading:
        """Read packed tokens [tokens], or states [tokens, width]; layer: counted from the first that is here."""
        if torch.is_grad_enabled():
            weights = [part.weight for part in (self.embed, self.norm, self.unembed) if part is not None]
            weights += [weight for one in self.layers for weight in one.weights]
            return Reading(*_Run.apply(self, entering, places, chosen, layer, *weights))  # type: ignore[no-untyped-call]
        return self.forward(entering, places, chosen, layer, None)

    def forward(
        self, entering: Tensor, places: list[Place], chosen: Tensor, layer: int | None, keep: list[Any] | None
    ) -> Reading:
        """Do what `read` says; what the backward pass needs is appended to `keep`."""
        x, states = entering if self.embed is None else self.embed(entering), None
        for number, (one, place) in enumerate(zip(self.layers, places, strict=True)):
            states = x if number == layer else states
            x, kept = one.forward(x, place)
            if keep is not None:
                keep.append(kept)
            del kept
        final, scale = rms_norm(x, self.norm.weight, self.norm.variance_epsilon)
        logprobs, every = chosen_logprobs(final @ self.unembed.weight.t(), chosen)
        if keep is not None:
            keep += [(x, scale), every]
        return Reading(logprobs, final, states)

    def backward(
        self,
        g: Tensor,
        by_final: Tensor,
        entering: Tensor,
        places: list[Place],
        chosen: Tensor,
        final: Tensor,
        kept: list[Any],
    ) -> Tensor | None:
        """Add to all weights' gradients, emptying `kept`; return the gradient by states that entered."""
        add = self.gradients
        by_logits = chosen_logprobs_backward(g, kept.pop(), chosen)
        add.product(self.unembed.weight, by_logits, final)
        by_final = by_logits @ self.unembed.weight + by_final
        del by_logits
        x, scale = kept.pop()
        by_x, by_weight = rms_norm_backward(by_final, x * scale, scale, self.norm.weight)
        add.sum(self.norm.weight, by_weight)
        for one, place in zip(reversed(self.layers), reversed(places), strict=True):
            by_x = one.backward(by_x, kept.pop(), place)
        if self.embed is None:
            return by_x
        padding = self.embed.padding_idx  # transformers' embeddings do not train it
        add.rows(self.embed.weight, entering, by_x if padding is None else by_x.mul_((entering != padding)[:, None]))
        return None


class _Run(torch.autograd.Function):
    """A stack's forward and backward passes; weights' gradients are added where they stay, not handed on."""

    @staticmethod
    def forward(
        ctx: Any,
        stack: Stack,
        entering: Tensor,
        places: list[Place],
        chosen: Tensor,
        layer: int | None,
        *_: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        ctx.kept = []
        reading = stack.forward(entering, places, chosen, layer, ctx.kept)
        ctx.stack, ctx.place = stack, (entering, places, chosen)
        ctx.save_for_backward(reading.final)
        if reading.states is not None:
            ctx.mark_non_differentiable(reading.states)
        return reading

    @staticmethod
    def backward(ctx: Any, g: Tensor, by_final: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        by_entering = ctx.stack.backward(g, by_final, *ctx.place, *ctx.saved_tensors, ctx.kept)
        return None, by_entering, *[None] * (len(ctx.needs_input_grad) - 2)
