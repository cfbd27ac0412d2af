"""The frozen policy that a training is compared with, as cheap in memory as it gets."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from rrlhf.models import LanguageModel, PolicyTop, Read


def frozen(top: PolicyTop, language: LanguageModel) -> Callable[..., Read]:
    """Return `PolicyTop.read` of the policy as it is now, which later steps do not reach.

    On a processor, weights that are still those of the model's file stay in the file: it is mapped into memory while
    the reference reads, and the system may drop its pages in between. Else they are copied.
    """
    names = _stored(top, language.network)
    reference = top.reference()
    if names is None:
        return reference.read
    file = _file(language.network)

    def read(*arguments: Any, **options: Any) -> Read:
        weights = load_file(file)
        _put(reference, {own: weights[name] for own, name in names.items()})
        try:
            return reference.read(*arguments, **options)
        finally:
            _put(reference, {own: torch.empty(0) for own in names})

    _put(reference, {own: torch.empty(0) for own in names})
    return read


def _put(reference: PolicyTop, weights: dict[str, torch.Tensor]) -> None:
    for name, weight in weights.items():
        reference.get_parameter(name).data = weight


def _file(network: Any) -> Path:
    return Path(network.name_or_path, "model.safetensors")


def _stored(top: PolicyTop, network: Any) -> dict[str, str] | None:
    """Return the name in the model's file of each weight that trains; None unless the file holds all as they are."""
    file, shared = (
        _file(network),
        {id(weight) for weight in top.unembed.parameters()} if top.first is not None else set(),
    )
    if network.device.type != "cpu" or not file.is_file():
        return None
    full_names = {id(weight): name for name, weight in network.named_parameters()}
    weights = {
        own: weight for own, weight in top.named_parameters() if id(weight) in full_names and id(weight) not in shared
    }
    with safe_open(file, framework="pt") as stored:
        held = set(stored.keys())
        for weight in weights.values():
            name = full_names[id(weight)]
            if name not in held or not torch.equal(stored.get_tensor(name), weight):
                return None
    return {own: full_names[id(weight)] for own, weight in weights.items()}
