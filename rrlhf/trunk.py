"""A Llama-like decoder's layers with what stands around them in training: embeddings, last norm, log-probabilities.

Does what transformers' modules do, forwards and backwards, with the formulas of rrlhf/kernels.py. The last layer works
for the tokens that are asked for only: nobody reads its other states. `fits` says where all this can stand in: plain
layers in float32 on a processor, in one process.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rrlhf.attention import Packing
from rrlhf.decoding import decodes
from rrlhf.kernels import (
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

MAPS = [f"self_attn.{name}_proj" for name in ("q", "k", "v", "o")] + [
    f"mlp.{name}_proj" for name in ("gate", "up", "down")
]


def fits(network: Any) -> bool:
    """Whether a network's layers are of the kind that stands here, and where it does."""
    if network.device.type != "cpu" or network.config.hidden_act != "silu" or not decodes(network):
        return False
    maps = [layer.get_submodule(name) for layer in network.model.layers for name in MAPS]
    return all(type(one) is nn.Linear and one.bias is None for one in [*maps, network.lm_head])


def stands_in(top: nn.Module) -> bool:
    """Whether it may be used now: nobody waits for other precision, a module's call, or autograd's gradients."""
    hooked = any(module._forward_hooks or module._forward_pre_hooks for module in top.modules())
    return not (hooked or torch.is_autocast_enabled("cpu") or torch.distributed.is_initialized())


class Gradients:
    """Adds to weights' `grad` in place, and keeps that memory from step to step.

    Handed to autograd, every gradient of a matrix would be new memory, which the system fills with zeros page by page.
    """

    def __init__(self) -> None:
        self._made: set[Tensor] = set()
        self._spare: dict[Tensor, Tensor] = {}

    def product(self, weight: Tensor, g: Tensor, x: Tensor) -> None:
        """Add g' x, the gradient by W of y = x W'."""
        if weight.requires_grad:
            if weight.grad is None:
                torch.mm(g.t(), x, out=self._new(weight))
            else:
                weight.grad.addmm_(g.t(), x)

    def sum(self, weight: Tensor, g: Tensor) -> None:
        """Add g."""
        if weight.requires_grad:
            if weight.grad is None:
                self._new(weight).copy_(g)
            else:
                weight.grad.add_(g)

    def rows(self, weight: Tensor, index: Tensor, g: Tensor) -> None:
        """Add g to the rows of `index`."""
        if weight.requires_grad:
            grad = self._new(weight).zero_() if weight.grad is None else weight.grad
            grad.index_add_(0, index, g)

    def _new(self, weight: Tensor) -> Tensor:
        grad = self._spare.pop(weight, None)
        weight.grad = torch.empty_like(weight) if grad is None else grad
        self._made.add(weight)
        return weight.grad

    def clear(self) -> None:
        """Have the weights without gradients, as `zero_grad` does, whose memory is kept."""
        self._spare |= {weight: weight.grad for weight in self._made if weight.grad is not None}
        for weight in self._made:
            weight.grad = None
        self._made.clear()

    def release(self) -> None:
        """Give the memory back."""
        self._spare.clear()


Turn = tuple[Tensor, Tensor]  # cosines and sines


class Side(NamedTuple):
    """Where the queries, or the keys and values, of packed tokens stand in a padded grid [batch, heads, width]."""

    seats: Tensor  # [tokens * heads] in the flattened grid
    source: Tensor  # [batch * heads * width] the packed row of each seat; any row on padding
    positions: Tensor  # [batch, width]; 0 on padding
    cosine: Tensor  # [tokens, 1, head width]
    sine: Tensor

    @classmethod
    def of(cls, row: Tensor, column: Tensor, position: Tensor, batch: int, heads: int, turn: Turn) -> Side:
        """Seat tokens at [row, column] of the grid; turn: their cosines and sines [tokens, head width]."""
        width = int(column.max()) + 1
        head = torch.arange(heads)
        seats = ((row[:, None] * heads + head) * width + column[:, None]).flatten()
        source = seats.new_zeros(batch * heads * width).index_copy_(0, seats, torch.arange(len(seats)))
        positions = position.new_zeros(batch, width)
        positions[row, column] = position
        return cls(seats, source, positions, turn[0][:, None], turn[1][:, None])

    def seated(self, packed: Tensor, blocks: int) -> Tensor:
        """Take [tokens, heads, head width] to [blocks, grid / blocks, head width]."""
        return packed.flatten(0, 1).index_select(0, self.source).view(blocks, -1, packed.shape[-1])

    def packed(self, grid: Tensor) -> Tensor:
        """Take a grid to [tokens, heads, head width]."""
        return grid.view(-1, grid.shape[-1]).index_select(0, self.seats).view(len(self.cosine), -1, grid.shape[-1])

    def seated_or_zero(self, packed: Tensor, blocks: int) -> Tensor:
        """Like `seated`, with zeros as padding: a gradient."""
        grid = packed.new_zeros(len(self.source), packed.shape[-1]).index_copy_(0, self.seats, packed.flatten(0, 1))
        return grid.view(blocks, -1, packed.shape[-1])


class Place(NamedTuple):
    """What a layer must know of a batch besides its states."""

    keys: Side
    queries: Side
    asked: Tensor | None  # the packed tokens that are queries; None: all
    bias: Tensor  # [blocks, queries, keys] 0 where a query may look, else -inf; a block is a row's group of heads

    @classmethod
    def of(cls, keys: Side, queries: Side, asked: Tensor | None, groups: int) -> Place:
        """Let each query look at the keys of its row up to its own position."""
        later = torch.arange(keys.positions.shape[1]) > queries.positions[..., None]  # [batch, queries, keys]
        bias = torch.zeros(later.shape).masked_fill_(later, -torch.inf)
        batch, asking, looked_at = bias.shape
        shared = len(queries.source) // (batch * groups * asking)  # heads that share keys
        every = bias[:, None, None].expand(batch, groups, shared, asking, looked_at)
        return cls(keys, queries, asked, every.reshape(batch * groups, -1, looked_at))


class Kept(NamedTuple):
    """What a layer's backward pass needs of its forward pass."""

    x: Tensor  # [tokens, width]
    scale: Tensor  # of the first norm
    queries: Tensor
    keys: Tensor
    values: Tensor
    weights: Tensor  # attention's
    attended: Tensor  # [asked tokens, heads * head width]
    middle: Tensor  # [asked tokens, width] states between attention and the feed-forward part
    middle_scale: Tensor  # of the second norm
    gate: Tensor
    up: Tensor


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
        gate, up = second @ self.gate.t(), second @ self.up.t()
        after = torch.addmm(middle, gated(gate, up), self.down.t())
        return after, Kept(x, scale, queries, keys, values, weights, attended, middle, middle_scale, gate, up)

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
        by_gate, by_up, result = gated_backward(g @ self.down, kept.gate, kept.up)
        add.product(self.down, g, result)
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
        by_queries, by_keys, by_values = attend_backward(grid, kept.queries, kept.keys, kept.values, kept.weights)
        query = rotate(place.queries.packed(by_queries), place.queries.cosine, place.queries.sine, -1)
        key = rotate(place.keys.packed(by_keys), place.keys.cosine, place.keys.sine, -1)
        return query.flatten(1), key.flatten(1), place.keys.packed(by_values).flatten(1)

    def _heads(self, states: Tensor) -> Tensor:
        return states.view(len(states), -1, self.width)


class Trunk:
    """Layers from some layer on, with the embeddings below them where they are all, and the readout above."""

    def __init__(self, embed: Any, rotary: Any, layers: Any, norm: Any, unembed: Any, gradients: Gradients) -> None:
        self.embed, self.rotary, self.norm, self.unembed = embed, rotary, norm, unembed
        self.layers = [Layer(layer, gradients) for layer in layers]
        self.gradients = gradients

    def places(self, packing: Packing, row: Tensor, step: Tensor, asked: Tensor) -> list[Place]:
        """Return each layer's place; asked: the packed tokens whose last states count, which are at [row, step]."""
        some, batch, position = self.layers[0], packing.batch, packing.positions[0]
        own = packing.places // packing.width
        heads, groups = len(some.query) // some.width, len(some.key) // some.width
        cosine, sine = (part[0] for part in self.rotary(self.norm.weight, position[None]))
        keys = Side.of(own, position, position, batch, groups, (cosine, sine))
        cosine, sine = (part * some.width**-0.5 for part in (cosine, sine))  # queries come scaled
        last = Side.of(row, step, position[asked], batch, heads, (cosine[asked], sine[asked]))
        places = [Place.of(keys, last, asked, groups)]
        if len(self.layers) > 1:
            whole = Side.of(own, position, position, batch, heads, (cosine, sine))
            places = [Place.of(keys, whole, None, groups)] * (len(self.layers) - 1) + places
        return places

    def read(self, entering: Tensor, places: list[Place], chosen: Tensor, layer: int | None = None) -> Reading:
        """Read packed tokens [tokens], or states [tokens, width]; layer: counted from the first that is here."""
        if torch.is_grad_enabled():
            weights = [part.weight for part in (self.embed, self.norm, self.unembed) if part is not None]
            weights += [weight for one in self.layers for weight in one.weights]
            return Reading(*_Pass.apply(self, entering, places, chosen, layer, *weights))  # type: ignore[no-untyped-call]
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


class Reading(NamedTuple):
    """What a trunk says about the asked tokens."""

    logprobs: Tensor  # [asked tokens] of the tokens that were chosen behind them
    final: Tensor  # [asked tokens, width] normalised last states
    states: Tensor | None  # [tokens, width] that enter the layer that was asked for


class _Pass(torch.autograd.Function):
    """A trunk's forward and backward passes; weights' gradients are added where they stay, not handed on."""

    @staticmethod
    def forward(
        ctx: Any,
        trunk: Trunk,
        entering: Tensor,
        places: list[Place],
        chosen: Tensor,
        layer: int | None,
        *_: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        ctx.kept = []
        reading = trunk.forward(entering, places, chosen, layer, ctx.kept)
        ctx.trunk, ctx.place = trunk, (entering, places, chosen)
        ctx.save_for_backward(reading.final)
        if reading.states is not None:
            ctx.mark_non_differentiable(reading.states)
        return reading

    @staticmethod
    def backward(ctx: Any, g: Tensor, by_final: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        by_entering = ctx.trunk.backward(g, by_final, *ctx.place, *ctx.saved_tensors, ctx.kept)
        return None, by_entering, *[None] * (len(ctx.needs_input_grad) - 2)
