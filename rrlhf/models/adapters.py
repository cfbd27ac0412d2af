"""Low-rank adapters beside frozen matrices, one or several, by peft (LoRA, Hu et al. 2021, arXiv 2106.09685)."""

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rrlhf.models.load import LanguageModel
from rrlhf.models.whole import decoder_layers

FOLDER = "adapters"  # sub-folder of a reward model's folder, with a folder for each adapter


def adaptable(network: Any) -> list[str]:
    """Return the names of the maps in the decoder layers that adapters can stand beside, each once."""
    from transformers.pytorch_utils import Conv1D

    maps = {part: name for name, part in network.named_modules() if isinstance(part, nn.Linear | Conv1D)}
    named = {maps[part].rpartition(".")[2]: maps[part] for part in decoder_layers(network).modules() if part in maps}
    return sorted(name for name, whole in named.items() if _is_taken(network, whole))


def _is_taken(network: Any, name: str) -> bool:
    """Whether peft puts adapters beside this map, which it refuses beside some of a make's."""
    from peft import LoraConfig

    try:
        is_turned = not isinstance(network.get_submodule(name), nn.Linear)  # of the two kinds of maps
        _peft_model(network, LoraConfig(r=1, target_modules=[name], fan_in_fan_out=is_turned), "tried").unload()
    except ValueError:
        return False
    return True


def usual_targets(network: Any) -> list[str]:
    """Return the maps that peft adapts in a model of this make; all of them where it knows none."""
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as KNOWN

    return list(KNOWN.get(network.config.model_type) or adaptable(network))


def adapted(
    language: LanguageModel, layers: range, rank: int, copies: int = 1, targets: Sequence[str] | None = None
) -> LanguageModel:
    """Put adapters beside maps of these decoder layers, in place; they start as the frozen maps.

    targets: names of the maps; None: `usual_targets`. Raises ValueError when no layer has one.
    """
    from peft import LoraConfig
    from transformers.pytorch_utils import Conv1D

    network, wanted = language.network, set(targets or usual_targets(language.network))
    names = {part: name for name, part in network.named_modules()}
    found = [
        part
        for number in layers
        for name, part in decoder_layers(network)[number].named_modules()
        if name.rpartition(".")[2] in wanted and isinstance(part, nn.Linear | Conv1D)
    ]
    if not found:
        raise ValueError(
            f"no layer has a map named {', '.join(sorted(wanted))}; it has {', '.join(adaptable(network))}"
        )
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=[names[part] for part in found],
        base_model_name_or_path="trunk",
        fan_in_fan_out=isinstance(found[0], Conv1D),
    )
    return _around(language, config, [f"head_{number:03}" for number in range(copies)])


def with_each(language: LanguageModel, read: Callable[[], Tensor]) -> list[Tensor]:
    """Return what `read` gives with each adapter in turn; without any, what it gives."""
    model = language.adapters
    if model is None:
        return [read()]
    found = []
    for name in model.peft_config:
        model.set_adapter(name)
        found.append(read())
    model.set_requires_grad([*model.peft_config])  # what `set_adapter` took from the others
    return found


def lowest_adapted(language: LanguageModel, otherwise: int) -> int:
    """Return the lowest layer with an adapter."""
    layers = enumerate(decoder_layers(language.network))
    return next((number for number, layer in layers if _beside(layer)), otherwise)


def merged(language: LanguageModel) -> LanguageModel:
    """Make a model with an adapter a plain one, W + B A, in place; one without stays as it is."""
    if language.adapters is None:
        return language
    return language._replace(network=language.adapters.merge_and_unload(), adapters=None)


def diversity(language: LanguageModel) -> Tensor:
    """Return the nuclear norm of the adapters' stacked A matrices [adapters * rank, in], averaged over adapted maps.

    Each row has its length taken out first, so the norm grows with the angles between adapters alone: it lies between
    sqrt(rows), when all rows are parallel, and rows, when all are at right angles. After UP-RLHF (Zhai et al. 2024,
    arXiv 2401.00243), which adds the nuclear norm of the concatenated LoRA matrices to what is maximised.
    """
    stacked = [torch.cat([down.weight for down in maps.values()]) for maps in _beside(language.network)]
    norms = [torch.linalg.matrix_norm(nn.functional.normalize(matrix, dim=1), "nuc") for matrix in stacked]
    return torch.stack(norms).mean()


def save_adapters(language: LanguageModel, folder: Path) -> LanguageModel:
    """Write the adapters as peft does, a folder each, and take them off the model, in place."""
    if language.adapters is None:
        return language
    language.adapters.save_pretrained(folder / FOLDER, save_embedding_layers=False)  # which asks no hub
    return language._replace(network=language.adapters.unload(), adapters=None)


def load_adapters(language: LanguageModel, folder: Path) -> LanguageModel:
    """Put a folder's adapters beside the model's maps, in place; a folder without any changes nothing."""
    from peft import PeftConfig

    if (folder / "adapters.safetensors").exists():
        raise ValueError(f"{folder}: its adapters are in a format of rrlhf before peft's; run its stage again")
    if not (folder / FOLDER).is_dir():
        return language
    stored = sorted(path for path in (folder / FOLDER).iterdir() if path.is_dir())
    found = _around(language, PeftConfig.from_pretrained(stored[0]), [path.name for path in stored])
    for path in stored:
        found.adapters.load_adapter(path, path.name)
    return found


def _around(language: LanguageModel, config: Any, names: list[str]) -> LanguageModel:
    model = _peft_model(language.network, config, names[0])
    for name in names[1:]:
        model.add_adapter(name, config)
    model.set_requires_grad(names)
    return language._replace(adapters=model)


def _peft_model(network: Any, config: Any, name: str) -> Any:
    from peft import PeftModel

    with warnings.catch_warnings():  # peft 0.21 asks for what transformers 5.23 calls by another name
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        return PeftModel(network, config, name)


def _beside(module: nn.Module) -> list[Any]:
    """Return the A matrices of every adapted map, by the name of their adapter."""
    return [part.lora_A for part in module.modules() if hasattr(part, "lora_A")]
