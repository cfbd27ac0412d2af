"""One decoding step of a Llama-like decoder with as few operations as it takes.

A step of a small model spends more time between matrix products than in them. Here each layer's products with the same
input are one, rotation is worked out once for all layers, and attention of a single query is two products. Whether a
network computes what stands here is tried when it is first used; one that does not (a layer of another make) decodes
the general way.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from rrlhf.language_models.adapters import Adapted
from rrlhf.language_models.attention import Cache
from rrlhf.language_models.kernels import rms_norm, rotate
from rrlhf.language_models.trial import say_the_same, trial_tokens

REPAYS = 24  # decoding steps after which weights laid out for half of the rows have repaid the time that it takes


class Product:
    """y = W x + b for `rows` rows at a time, or fewer; 0: for any, with the weights as they stand.

    MKL lays a matrix out anew in every product, which takes as long as a product of few rows itself. Laid out once, for
    so many rows, it is nearly twice as quick at 32.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, rows: int) -> None:
        self._weight, self._bias, self._rows, self._laid_out = weight, bias, rows, None
        if rows and weight.device.type == "cpu" and weight.dtype == torch.float32 and torch.backends.mkl.is_available():
            self._laid_out = torch.ops.mkl._mkl_reorder_linear_weight(weight, rows)
            self._weight = weight.new_empty(1, 1).expand_as(weight)  # only its shape is looked at from now on

    @property
    def is_laid_out(self) -> bool:
        """Whether the weights stand in memory in another order than the network's."""
        return self._laid_out is not None

    def __call__(self, x: Tensor) -> Tensor:
        """Map [rows, in] to [rows, out]."""
        if self._laid_out is None:
            return linear(x.to(self._weight.dtype), self._weight, self._bias)
        missing = self._rows - len(x)
        padded = pad(x, (0, 0, 0, missing)) if missing else x
        mapped: Tensor = torch.ops.mkl._mkl_linear(padded, self._laid_out, self._weight, self._bias, self._rows)
        return mapped[: len(x)]


class Layer(NamedTuple):
    """A decoder layer; maps of the same input are one."""

    norm: Any  # module before attention
    attention: Product  # to queries, keys and values
    output: Product
    second_norm: Any  # module before the feed-forward part
    gated: Product  # to gate and up
    down: Product


class LaidOut(NamedTuple):
    """Products of maps that do not train, to be used again."""

    rows: int
    products: dict[Any, Product]  # by the first of the maps


NOTHING = LaidOut(0, {})


class Decoder:
    """A network's layers as they are now, for steps of one token in up to `rows` rows; training does not reach it."""

    def __init__(
        self, network: Any, rows: int, dtype: torch.dtype = torch.float32, laid_out: LaidOut = NOTHING
    ) -> None:
        """Lay out what is not in `laid_out` for as many rows; 0 rows: nothing, so any number is served, slowly."""
        config = network.config
        self._network, self._dtype = network, dtype
        self._frozen: dict[Any, Product] = dict(laid_out.products) if laid_out.rows == rows else {}
        self._heads, self._groups = config.num_attention_heads, config.num_key_value_heads
        self._width = getattr(config, "head_dim", None) or config.hidden_size // self._heads
        self._activation = network.model.layers[0].mlp.act_fn
        self.rows = rows
        self._layers = [
            Layer(
                layer.input_layernorm,
                self._stacked(layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj),
                self._stacked(layer.self_attn.o_proj),
                layer.post_attention_layernorm,
                self._stacked(layer.mlp.gate_proj, layer.mlp.up_proj),
                self._stacked(layer.mlp.down_proj),
            )
            for layer in network.model.layers
        ]
        self._unembedding = self._stacked(network.lm_head)

    def quickest(self, rows: int, steps: int) -> Decoder:
        """Return the decoder for so many steps of so many rows: this one, or one that is laid out anew if it pays."""
        return self if 2 * rows > self.rows or steps < REPAYS else Decoder(self._network, rows, self._dtype)

    @property
    def frozen(self) -> LaidOut:
        """What was laid out and does not train."""
        return LaidOut(self.rows, self._frozen)

    def logits(self, state: Tensor) -> Tensor:
        """Return the logits of normalised last states [rows, width]."""
        with torch.autocast(state.device.type, enabled=False):
            return self._unembedding(state)

    def _stacked(self, *maps: Any) -> Product:
        known = self._frozen.get(maps[0])
        if known is not None:
            return known
        product = self._laid(*maps)
        if product.is_laid_out and not any(weight.requires_grad for one in maps for weight in one.parameters()):
            self._frozen[maps[0]] = product
        return product

    def _laid(self, *maps: Any) -> Product:
        weights = [one.merged() if isinstance(one, Adapted) else one.weight.detach() for one in maps]
        bases = [one.base if isinstance(one, Adapted) else one for one in maps]
        biases = [base.bias.detach() for base in bases if base.bias is not None]
        weight = torch.cat(weights) if len(weights) > 1 else weights[0]
        bias = torch.cat(biases).to(self._dtype) if biases else None
        return Product(weight.to(self._dtype), bias, self.rows)

    def step(
        self, hidden: Tensor, positions: Tensor, bias: Tensor, cache: Cache, keep: tuple[int, ...]
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Run all layers on one new token per row; return its last state, and the states that enter some layers.

        hidden: [rows, width] embeddings; positions: [rows]; bias: [rows, tokens so far, this one included], 0 or
        -inf; cache: keys and values of the tokens before, to which these are added.
        """
        states: dict[int, Tensor] = {}
        with torch.autocast(hidden.device.type, enabled=False):
            cosine, sine = self._network.model.rotary_emb(hidden[:, None], positions[:, None])
            shared = (len(hidden), self._groups, self._heads // self._groups, bias.shape[1])
            bias = bias[:, None, None].expand(shared).flatten(0, 1)
            for number, layer in enumerate(self._layers):
                if number in keep:
                    states[number] = hidden
                hidden = hidden + self._attend(layer, number, hidden, (cosine, sine), bias, cache)
                gate, up = layer.gated(_normal(layer.second_norm, hidden)).chunk(2, dim=-1)
                hidden = hidden + layer.down(self._activation(gate).mul_(up))
        if len(self._layers) in keep:
            states[len(self._layers)] = hidden
        return hidden, states

    def _attend(
        self, layer: Layer, number: int, hidden: Tensor, rotation: tuple[Tensor, Tensor], bias: Tensor, cache: Cache
    ) -> Tensor:
        heads, groups = self._heads, self._groups
        mapped = layer.attention(_normal(layer.norm, hidden)).unflatten(-1, (-1, self._width))
        turned, value = mapped.split([heads + groups, groups], dim=1)
        query, key = rotate(turned, *rotation).split([heads, groups], dim=1)
        keys, values = (
            states.flatten(0, 1) for states in cache.update(key[:, :, None], value[:, :, None], number)
        )  # [rows and groups, tokens, head width]
        query = (query * self._width**-0.5).to(keys.dtype).view(len(keys), -1, self._width)
        weights = torch.baddbmm(bias.to(keys.dtype), query, keys.transpose(1, 2)).softmax(dim=-1)
        return layer.output(torch.bmm(weights.to(values.dtype), values).view(len(hidden), -1))


def _normal(norm: Any, x: Tensor) -> Tensor:
    return rms_norm(x, norm.weight, norm.variance_epsilon)[0]


@torch.no_grad()
def quick_decoder(network: Any, rows: int, laid_out: LaidOut = NOTHING) -> Decoder | None:
    """Return a decoder for up to `rows` rows in the precision of the moment; None: the network decodes otherwise.

    laid_out: what an earlier one of this network, in this precision, left.
    """
    device = network.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else torch.float32
    return Decoder(network, rows, dtype, laid_out) if decodes(network) else None


@torch.no_grad()
def decodes(network: Any) -> bool:
    """Whether `Decoder` computes what the network does; tried once on a few tokens, then remembered with it."""
    known = getattr(network, "_rrlhf_decodes", None)
    if known is None:
        known = network._rrlhf_decodes = _agrees(network)
    return bool(known)


def _agrees(network: Any) -> bool:
    tokens = trial_tokens(network)
    with torch.autocast(network.device.type, enabled=False):
        expected = network.model(tokens).last_hidden_state[0, -1]
        try:
            decoder = Decoder(network, 0)
            cache = Cache(len(network.model.layers), tokens.shape[1])
            for i in range(tokens.shape[1]):
                at, bias = tokens.new_tensor([i]), torch.zeros(1, i + 1, device=network.device)
                hidden, _ = decoder.step(network.model.embed_tokens(tokens[:, i]), at, bias, cache, ())
        except (AttributeError, RuntimeError, TypeError, ValueError):  # layers of another make
            return False
        return say_the_same(network.model.norm(hidden)[0], expected)
