"""The device and the processes that train: precision, parts of a batch that fit in memory, and what moves."""

import contextlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn

from rrlhf.config import Model
from rrlhf.hardware import device_kind, dtype_name
from rrlhf.models.shards import shares
from rrlhf.progress import track
from rrlhf.stopping import check_stop

Row = TypeVar("Row")
Part = TypeVar("Part")

DATA_PARALLEL = {DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU}


def accelerator(model: Model) -> Accelerator:
    """Return the device and the processes of this run. Precision is ours (`autocast`): heads stay in float32.

    Raises ValueError where a file from `accelerate config` asks for more than data parallelism.
    """
    engine = Accelerator(cpu=device_kind(model.device) == "cpu")
    if engine.distributed_type not in DATA_PARALLEL:
        kind = engine.distributed_type.value
        raise ValueError(f"accelerate's configuration asks for {kind}: leave it out, and set launch.sharding to full")
    return engine


def autocast(model: Model) -> torch.autocast:
    """Return the context in which a language model's layers run."""
    device = device_kind(model.device)
    return torch.autocast(device, torch.bfloat16, enabled=dtype_name(model.dtype, device) == "bfloat16")


def in_parts(rows: int, size: int, label: str) -> Iterator[slice]:
    """Yield so many rows, `size` at a time; show how far that is, and end between two parts where it is asked for."""
    starts = range(0, rows, size)
    for start in track(starts, len(starts), label) if label else starts:
        yield slice(start, start + size)
        check_stop()


def microbatches(
    engine: Accelerator, network: nn.Module, rows: list[Row], size: int
) -> Iterator[tuple[tuple[list[Row], bool], AbstractContextManager[object]]]:
    """Split this process's share of a batch into parts that fit in memory, each with whether it counts (`shares`).

    Gradients accumulate over the parts and are exchanged between processes with the last one only.
    """
    yield from accumulated(engine, network, shares(engine, rows, size))


def accumulated(
    engine: Accelerator, network: nn.Module, parts: Sequence[Part]
) -> Iterator[tuple[Part, AbstractContextManager[object]]]:
    """Yield the parts of a batch, each with the context of its backward pass: only the last exchanges gradients.

    Where weights are spread each does, for no process has room for all gradients.
    """
    for part in parts[:-1]:
        yield part, engine.no_sync(network)
    yield parts[-1], contextlib.nullcontext()


def trained_weights(module: nn.Module) -> list[nn.Parameter]:
    """Return the weights that train, and make them float32, in place: bfloat16 would lose steps that are small."""
    weights = [weight for weight in module.parameters() if weight.requires_grad]
    for weight in weights:
        weight.data = weight.data.float()
    return weights
