"""Attention over rows of different lengths without work on padding, and the keys and values of a growing batch.

While training, the tokens of all rows are laid end to end ("packed"): everything but attention looks at one token at a
time, so only attention sees padding (`Place`, or `packed_attention` for transformers' layers). While sampling, keys and
values are written into memory that was taken once.
"""

from __future__ import annotations

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

    @classmethod
    def of(cls, lengths: Tensor) -> Packing:
        """Lay rows of `lengths` [batch] end to end."""
        width = int(lengths.max())
        inside = torch.arange(width, device=lengths.device) < lengths[:, None]
        return cls(inside.flatten().nonzero()[:, 0], len(lengths), width)

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


class Asked(NamedTuple):
    """Tokens whose log-probabilities are asked for."""

    row: Tensor  # [asked] of the batch
    step: Tensor  # [asked] of the response
    token: Tensor  # [asked]
    at: Tensor  # [asked] the packed token before it, which predicts it


Turn = tuple[Tensor, Tensor]  # cosines and sines


class Side(NamedTuple):
    """Where the queries, or the keys and values, of packed tokens stand in a padded grid [batch, heads, width]."""

    seats: Tensor  # [tokens * heads] in the flattened grid
    source: Tensor  # [batch * heads * width] the packed row of each seat; any row on padding
    positions: Tensor  # [batch, width]; 0 on padding
    cosine: Tensor  # [tokens, 1, head width]
    sine: Tensor

    @classmethod
    def of(
        cls,
        row: Tensor,
        column: Tensor,
        position: Tensor,
        batch: int,
        heads: int,
        turn: Turn,
        shared: Tensor | None = None,
    ) -> Side:
        """Seat tokens at [row, column] of the grid; turn: their cosines and sines [tokens, head width].

        shared: `source` of a packing whose rows share tokens, each of which then has many seats.
        """
        width = int(column.max()) + 1
        head = torch.arange(heads)
        seats = ((row[:, None] * heads + head) * width + column[:, None]).flatten()
        if shared is None:
            source = seats.new_zeros(batch * heads * width).index_copy_(0, seats, torch.arange(len(seats)))
        else:
            source = (shared.clamp(min=0).view(batch, 1, width) * heads + head[:, None]).flatten()
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
    """Keys and values of all layers for up to `capacity` tokens per row, as transformers' layers call it.

    Keys lie transposed, a head's numbers for all tokens side by side: MKL multiplies a single query with them up to
    seven times as fast.
    """

    def __init__(self, layers: int, capacity: int) -> None:
        self.capacity = capacity
        self.filled = [0] * layers
        self.keys: list[Tensor | None] = [None] * layers
        self.values: list[Tensor | None] = [None] * layers

    def update(self, key: Tensor, value: Tensor, layer: int, *_: Any) -> tuple[Tensor, Tensor]:
        """Append [batch, heads, tokens, head width] to a layer; return all that it holds."""
        start, end = self.filled[layer], self.filled[layer] + key.shape[2]
        self.filled[layer] = end
        keys, values = self.keys[layer], self.values[layer]
        if keys is None or values is None:
            keys = self.keys[layer] = key.new_empty(*key.shape[:2], key.shape[3], self.capacity)
            values = self.values[layer] = value.new_empty(*value.shape[:2], self.capacity, value.shape[3])
        keys[..., start:end] = key.transpose(2, 3)
        values[:, :, start:end] = value
        return keys[..., :end].transpose(2, 3), values[:, :, :end]

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
