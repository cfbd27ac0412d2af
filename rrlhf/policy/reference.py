"""The frozen policy that a training is compared with, as cheap in memory as it gets."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from rrlhf.models.load import LanguageModel
from rrlhf.models.top import PolicyTop, Read

OPEN_FILES = Path("/proc/self/fd")  # Linux's


def frozen(top: PolicyTop, language: LanguageModel) -> Callable[..., Read]:
    """Return `PolicyTop.read` of the policy as it is now, which later steps do not reach.

    On a processor, weights that are still those of the model's file stay there: the file is mapped into memory while
    the reference reads, which costs next to nothing as long as the system caches it. Else they are copied.
    """
    names = _stored(top, language)
    reference = top.reference()
    if not names:
        return reference.read
    number = os.open(_file(language), os.O_RDONLY)  # open, it stays what it is, whatever its name comes to mean
    weakref.finalize(reference, os.close, number)
    nothing = dict.fromkeys(names, torch.empty(0))

    def read(*arguments: Any, **options: Any) -> Read:
        weights = load_file(OPEN_FILES / str(number))
        _put(reference, {own: weights[name] for own, name in names.items()})
        try:
            return reference.read(*arguments, **options)
        finally:
            _put(reference, nothing)

    _put(reference, nothing)
    return read


def _put(reference: PolicyTop, weights: dict[str, Tensor]) -> None:
    for name, weight in weights.items():
        reference.get_parameter(name).data = weight


def _file(language: LanguageModel) -> Path:
    return Path(language.network.name_or_path, "model.safetensors")


def _stored(top: PolicyTop, language: LanguageModel) -> dict[str, str]:
    """Return the name in the model's file of each weight that is to be copied; nothing unless it holds all of them."""
    if language.device.type != "cpu" or not OPEN_FILES.is_dir() or not _file(language).is_file():
        return {}
    shared = set() if top.first is None else set(top.unembed.parameters())
    known = {weight: name for name, weight in language.network.named_parameters()}
    names = {own: known[w] for own, w in top.named_parameters() if w in known and w not in shared}
    with safe_open(_file(language), framework="pt") as stored:
        held = set(stored.keys())
        is_held = all(
            name in held and torch.equal(stored.get_tensor(name), top.get_parameter(own)) for own, name in names.items()
        )
    return names if is_held else {}
