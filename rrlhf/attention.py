"""Attention over rows of different lengths without work on padding, and the keys and values of a growing batch.

While training, the tokens of all rows are laid end to end ("packed"): everything but attention looks at one token at a
time, so only attention sees padding. While sampling, keys and values are written into memory that was taken once.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

PACKED = "packed"  # name of the attention function below in transformers' registry


class Packing(NamedTuple):
    """Where the tokens of rows padded on the right are when they stand end to end."""

    places: Tensor  # [tokens] of the flattened grid [batch, width]
    batch: int
    width: int

    @classmethod
    def of(cls, lengths: Tensor) -> Packing:
        """Lay rows of `lengths` [batch] end to end."""
        width = int(lengths.max())
        inside = torch.arange(width, device=lengths.device) < lengths[:, None]
        return cls(inside.flatten().nonzero()[:, 0], len(lengths), width)

    @property
    def positions(self) -> Tensor:
        """Each token's position in its own row, [1, tokens]."""
        return (self.places % self.width)[None]

    def packed(self, grid: Tensor) -> Tensor:
        """Take the tokens out of [batch, at least width, ...]; return [1, tokens, ...]."""
        return grid[:, : self.width].flatten(0, 1).index_select(0, self.places)[None]

    def grid(self, packed: Tensor) -> Tensor:
        """Put [1, tokens, ...] back into [batch, width, ...], with zeros as padding."""
        empty = packed.new_zeros(self.batch * self.width, *packed.shape[2:])
        return empty.index_copy(0, self.places, packed[0]).view(self.batch, self.width, *packed.shape[2:])

    def flat(self, row: Tensor, column: Tensor) -> Tensor:
        """Return where the tokens at [row, column] of the grid stand among the packed ones."""
        return torch.searchsorted(self.places, row * self.width + column)


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
    **settings: Any,
) -> tuple[Tensor, None]:
    """Attend within each packed row, causally; without a packing this is transformers' own "sdpa".

    query, key, value: [1, heads, tokens, head width] packed; returns [1, tokens, heads, head width].
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if packing is None:
        attended, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **settings)
        return attended, None
    rows = (packing.grid(states.transpose(1, 2)).transpose(1, 2) for states in (query, key, value))
    attended, _ = sdpa_attention_forward(module, *rows, None, **settings)
    return packing.packed(attended), None


class Cache:
    """Keys and values of all layers for up to `capacity` tokens per row, as transformers' layers call it."""

    def __init__(self, layers: int, capacity: int) -> None:
        self.capacity = capacity
        self.filled = [0] * layers
        self.keys: list[Tensor | None] = [None] * layers
        self.values: list[Tensor | None] = [None] * layers

    def update(self, key: Tensor, value: Tensor, layer: int, *_: Any) -> tuple[Tensor, Tensor]:
        """Append [batch, heads, tokens, head width] to a layer; return all that it holds."""
        start, end = self.filled[layer], self.filled[layer] + key.shape[2]
        self.filled[layer] = end
        held = []
        for store, new in (self.keys, key), (self.values, value):
            memory = store[layer]
            if memory is None:
                memory = store[layer] = new.new_empty(*new.shape[:2], self.capacity, new.shape[3])
            memory[:, :, start:end] = new
            held.append(memory[:, :, :end])
        return held[0], held[1]

    def keep(self, rows: Tensor) -> None:
        """Forget all rows but `rows`."""
        for store in self.keys, self.values:
            store[:] = [None if memory is None else memory[rows] for memory in store]


class Filling:
    """Puts the keys and values of packed rows into a cache, padded on the right, as transformers' layers call it."""

    def __init__(self, cache: Cache, packing: Packing) -> None:
        self._cache, self._packing = cache, packing

    def update(self, key: Tensor, value: Tensor, layer: int, *_: Any) -> tuple[Tensor, Tensor]:
        """Keep [1, heads, tokens, head width]; return the same, for attention among themselves."""
        keys, values = (self._packing.grid(states.transpose(1, 2)).transpose(1, 2) for states in (key, value))
        self._cache.update(keys, values, layer)
        return key, value
