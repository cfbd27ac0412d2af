"""The frozen policy that a training is compared with, as cheap in memory as it gets."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from rrlhf.models.load import LanguageModel
from rrlhf.models.top import PolicyTop, Read


def frozen(top: PolicyTop, language: LanguageModel, mesh: DeviceMesh | None = None) -> Callable[..., Read]:
    """Return `PolicyTop.read` of the policy as it is now, which later steps do not reach.

    On a processor, weights that are still those of the model's file stay there: the file is mapped into memory while
    the reference reads, which costs next to nothing as long as the system caches it. Else they are copied, and spread
    over the processes of a mesh.
    """
    reference = top.reference()
    if mesh:
        reference.spread(mesh)
        return reference.read
    file = Path(language.network.name_or_path, "model.safetensors")
    names = _stored(top, language, file)
    if not names:
        return reference.read
    nothing = dict.fromkeys(names.values(), torch.empty(0))

    def put(weights: dict[str, Tensor]) -> None:
        for own, name in names.items():
            reference.get_parameter(own).data = weights[name]

    def read(*arguments: Any, **options: Any) -> Read:
        put(load_file(file))
        try:
            return reference.read(*arguments, **options)
        finally:
            put(nothing)

    put(nothing)
    return read


def _stored(top: PolicyTop, language: LanguageModel, file: Path) -> dict[str, str]:
    """Return the name in the model's file of each weight that is to be copied; nothing unless it holds all of them."""
    if language.device.type != "cpu" or not file.is_file():
        return {}
    known = {weight: name for name, weight in language.network.named_parameters()}
    names = {own: known[w] for own, w in top.named_parameters() if w in known and w.requires_grad}
    with safe_open(file, framework="pt") as stored:
        held = set(stored.keys())
        is_held = all(
            name in held and _same(stored.get_tensor(name), top.get_parameter(own)) for own, name in names.items()
        )
    return names if is_held else {}


def _same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)  # which alone would compare across dtypes
