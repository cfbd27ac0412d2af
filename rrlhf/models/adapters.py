"""K low-rank adapters beside the same frozen matrices, run as one batch (LoRA, Hu et al. 2021, arXiv 2106.09685)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

WEIGHTS = "adapters.safetensors"
SHAPE = "adapters.json"
MAPS = ("q_proj", "v_proj")  # that adapters stand beside


class Adapted(nn.Module):
    """A frozen linear map with K low-rank additions: rows come in K equal blocks, one for each adapter.

    y_k = W x_k + B_k A_k x_k. B starts at 0, so all adapters start as the frozen map.
    """

    def __init__(self, base: nn.Linear, copies: int, rank: int) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.off = False
        device = base.weight.device
        start = torch.randn(copies, rank, base.in_features) * base.in_features**-0.5
        self.down = nn.Parameter(start.to(device))
        self.up = nn.Parameter(torch.zeros(copies, base.out_features, rank, device=device))

    def forward(self, x: Tensor) -> Tensor:
        """Map [adapters * rows, tokens, in] to [adapters * rows, tokens, out]."""
        mapped: Tensor = self.base(x)
        if self.off:
            return mapped
        blocks = x.unflatten(0, (len(self.down), -1))
        low = torch.einsum("kbti,kri->kbtr", blocks, self.down.to(x.dtype))
        added = torch.einsum("kbtr,kor->kbto", low, self.up.to(x.dtype)).flatten(0, 1)
        return mapped + added

    def merged(self) -> Tensor:
        """Return W + B A, [out, in], of a map with one adapter."""
        return self.base.weight + self.up[0] @ self.down[0]


def can_adapt(network: Any) -> bool:
    """Whether every layer has the maps that `adapt` puts adapters beside."""
    return all(
        isinstance(getattr(layer.self_attn, name, None), nn.Linear) for layer in network.model.layers for name in MAPS
    )


def adapt(network: Any, first: int, last: int, copies: int, rank: int) -> None:
    """Put K adapters beside the query and value maps of decoder layers first..last-1, in place."""
    for layer in network.model.layers[first:last]:
        for name in MAPS:
            setattr(layer.self_attn, name, Adapted(getattr(layer.self_attn, name), copies, rank))
    network.adapted = {"first": first, "last": last, "copies": copies, "rank": rank}


def adapters(network: Any) -> list[Adapted]:
    """Return every adapted map, from the bottom up."""
    return [module for module in network.modules() if isinstance(module, Adapted)]


@contextmanager
def without_adapters(network: Any) -> Iterator[None]:
    """Have the network as it was before it was adapted."""
    for module in adapters(network):
        module.off = True
    try:
        yield
    finally:
        for module in adapters(network):
            module.off = False


@torch.no_grad()
def merge_adapters(network: Any) -> None:
    """Make a network with one adapter on each map a plain one, W + B A, in place; one without stays as it is."""
    for adapted in _detached(network):
        adapted.base.weight.copy_(adapted.merged())


def copies_of(network: Any) -> int:
    """Return how many adapters each adapted map has; 1 when there are none."""
    return int(getattr(network, "adapted", {"copies": 1})["copies"])


def first_adapted(network: Any, layer: int) -> int:
    """Return the lowest adapted layer, or `layer` when there are no adapters."""
    return int(getattr(network, "adapted", {"first": layer})["first"])


def diversity(network: Any) -> Tensor:
    """Return the nuclear norm of the adapters' stacked `down` matrices [K * rank, in], averaged over adapted maps.

    Each row has its length taken out first, so the norm grows with the angles between adapters alone: it lies between
    sqrt(rows), when all rows are parallel, and rows, when all are at right angles. After UP-RLHF (Zhai et al. 2024,
    arXiv 2401.00243), which adds the nuclear norm of the concatenated LoRA matrices to what is maximised.
    """
    stacked = [nn.functional.normalize(module.down.flatten(0, 1), dim=1) for module in adapters(network)]
    return torch.stack([torch.linalg.matrix_norm(matrix, "nuc") for matrix in stacked]).mean()


def save_adapters(network: Any, folder: Path) -> None:
    """Write the adapters' weights and shape, and take them off the network, in place."""
    tensors: dict[str, Tensor] = {}
    for number, module in enumerate(adapters(network)):
        tensors |= {f"{number}.down": module.down.detach().cpu(), f"{number}.up": module.up.detach().cpu()}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS)
    (folder / SHAPE).write_text(json.dumps(network.adapted), encoding="utf-8")
    _detached(network)


def load_adapters(network: Any, folder: Path) -> None:
    """Put the adapters of a folder beside the network's maps, in place; a folder without any changes nothing."""
    if not (folder / WEIGHTS).exists():
        return
    adapt(network, **json.loads((folder / SHAPE).read_text(encoding="utf-8")))
    stored = load_file(folder / WEIGHTS)
    with torch.no_grad():
        for number, module in enumerate(adapters(network)):
            module.down.copy_(stored[f"{number}.down"])
            module.up.copy_(stored[f"{number}.up"])


def _detached(network: Any) -> list[Adapted]:
    """Put the frozen maps back in the place of the adapted ones, which are returned."""
    taken = adapters(network)
    for layer in network.model.layers:
        for name in MAPS:
            module = getattr(layer.self_attn, name)
            if isinstance(module, Adapted):
                setattr(layer.self_attn, name, module.base)
    if taken:
        del network.adapted
    return taken
