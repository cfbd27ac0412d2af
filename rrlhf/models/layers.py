"""A language model's layers, run one range at a time through their own modules, over rows without work on padding.

One pass through the frozen lower layers so serves the policy, the reference, the value function and the reward
features. It asks for a decoder of the Llama family's layout (`model.layers`, `model.rotary_emb`, `model.norm`,
`lm_head`), which Llama, Mistral, Qwen and SmolLM share; rrlhf/models/trial.py says whether a model is one, and
rrlhf/models/whole.py runs the others.

The tokens of all rows are laid end to end ("packed"): everything but attention looks at one token at a time, so only
attention could see padding; on a CPU it takes the rows one by one instead. It learns where they are by keywords that
transformers hands down through a model's own layers to its attention functions.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from inspect import signature
from typing import Any, NamedTuple

import torch
from torch import Tensor

PACKED = "packed"  # name of the attention function below in transformers' registry


class Packing(NamedTuple):
    """Where the tokens of rows padded on the right are when they stand end to end."""

    places: Tensor  # [tokens] of the flattened grid [batch, width]; of a shared token, the first of its places
    batch: int
    width: int
    source: Tensor | None = None  # [batch * width] the token at each place, -1 on padding; None: none is shared
    lengths: tuple[int, ...] = ()  # of the rows, where no token is shared

    @classmethod
    def of(cls, lengths: Tensor) -> Packing:
        """Lay rows of `lengths` [batch] end to end."""
        counts = tuple(lengths.tolist())
        inside = torch.arange(max(counts), device=lengths.device) < lengths[:, None]
        return cls(inside.flatten().nonzero()[:, 0], len(counts), max(counts), lengths=counts)

    @classmethod
    def sharing(cls, rows: list[list[int]], device: torch.device) -> tuple[Tensor, Packing]:
        """Lay rows of tokens end to end, what they have in common at their beginnings once; return the tokens [tokens].

        A causal decoder's states at a token depend on nothing but the row up to there. So a chat template's first
        words, and a prompt that is answered several times, are worked on once: the tokens are the nodes of the rows'
        prefix tree.
        """
        width = max(map(len, rows))
        nodes: dict[tuple[int, int], int] = {}  # by the node before it, -1 for none, and its token
        places: list[int] = []
        source = [-1] * (len(rows) * width)
        for number, row in enumerate(rows):
            node = -1
            for place, token in enumerate(row, number * width):
                node = nodes.setdefault((node, token), len(nodes))
                if node == len(places):
                    places.append(place)
                source[place] = node
        tokens, at, spread = (torch.tensor(one, device=device) for one in ([t for _, t in nodes], places, source))
        return tokens, cls(at, len(rows), width, spread)

    @property
    def positions(self) -> Tensor:
        """Each token's position in its own row, [1, tokens]."""
        return (self.places % self.width)[None]

    def packed(self, grid: Tensor) -> Tensor:
        """Take the tokens out of [batch, at least width, ...], each at its first place; return [1, tokens, ...]."""
        return grid[:, : self.width].flatten(0, 1).index_select(0, self.places)[None]

    def grid(self, packed: Tensor) -> Tensor:
        """Put [1, tokens, ...] back into [batch, width, ...], with zeros as padding."""
        if self.source is not None:
            spread = packed[0].index_select(0, self.source.clamp(min=0))
            spread[self.source < 0] = 0
            return spread.view(self.batch, self.width, *packed.shape[2:])
        empty = packed.new_zeros(self.batch * self.width, *packed.shape[2:])
        return empty.index_copy(0, self.places, packed[0]).view(self.batch, self.width, *packed.shape[2:])

    def heads(self, packed: Tensor) -> Tensor:
        """Put keys, values or queries [1, heads, tokens, head width] into [batch, heads, width, head width]."""
        return self.grid(packed.transpose(1, 2)).transpose(1, 2)

    def flat(self, row: Tensor, column: Tensor) -> Tensor:
        """Return where the tokens at [row, column] of the grid stand among the packed ones."""
        place = row * self.width + column
        return torch.searchsorted(self.places, place) if self.source is None else self.source[place]


def groups(lengths: Tensor, tokens: int) -> list[Tensor]:
    """Split rows of `lengths` [batch] into groups of similar length, of at most so many tokens with their padding."""
    found: list[list[int]] = []
    for row in lengths.argsort(stable=True).tolist():  # each is at least as long as those before it
        if not found or (len(found[-1]) + 1) * int(lengths[row]) > tokens:
            found.append([])
        found[-1].append(row)
    return [torch.tensor(group, device=lengths.device) for group in found]


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
            packing=packing,
            age=age,
            **({} if cache is None else {_cache_keyword(type(layer).forward): cache, "use_cache": True}),
        )
    return hidden


@functools.cache
def _cache_keyword(forward: Callable[..., Tensor]) -> str:
    """Return what a class of layers calls the cache: transformers 5.24 began to rename it."""
    return "cache" if "cache" in signature(forward).parameters else "past_key_values"


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


def register() -> None:
    """Tell transformers of `packed_attention` under the name PACKED."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(PACKED, packed_attention)
    AttentionMaskInterface.register(PACKED, sdpa_mask)


def packed_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    packing: Packing | None = None,
    age: Tensor | None = None,
    **settings: Any,
) -> tuple[Tensor, None]:
    """Attend within each packed row, causally; or from one new token a row to those before it; or as "sdpa" does.

    query, key, value: [1, heads, tokens, head width] packed. With `age`, [batch, keys], query is [batch, heads, 1, head
    width], and age tells how many tokens of its row ago each key was; below 0 it is none of the row's.
    Returns [1 or batch, tokens, heads, head width].
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    window: int | None = settings.get("sliding_window")
    attend: Callable[..., tuple[Tensor, None]] = functools.partial(sdpa_attention_forward, module, **settings)
    if age is not None:
        seen = age >= 0 if window is None else (age >= 0) & (age < window)
        return attend(query, key, value, seen[:, None, None])
    if packing is None:
        return attend(query, key, value, attention_mask)
    if query.device.type == "cpu" and packing.lengths:  # a row at a time, where a call costs less than padding
        rows = zip(*(states.split(packing.lengths, dim=2) for states in (query, key, value)), strict=True)
        return torch.cat([attend(*row, _band(row[0], window))[0] for row in rows], dim=1), None
    query, key, value = (packing.heads(states) for states in (query, key, value))
    return packing.packed(attend(query, key, value, _band(query, window))[0]), None


def _band(query: Tensor, window: int | None) -> Tensor | None:
    """Return which keys each query sees, itself and window - 1 tokens before it, [1, 1, width, width]; None: all."""
    if window is None or query.shape[2] <= window:
        return None
    at = torch.arange(query.shape[2], device=query.device)
    ago = at[:, None] - at
    return ((ago >= 0) & (ago < window))[None, None]
