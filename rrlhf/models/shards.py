"""Weights in shares: a process holds a part of each, and the whole of a layer only while that layer runs (FSDP2).

Zhao et al. 2023, arXiv 2304.11277, as torch's `fully_shard` does it: a decoder layer is a group, and so is what a
policy has around its layers. A group is gathered when it is called, by all processes together, so all of them call the
same parts equally often: one that has less to do goes along with what does not count.
"""

import os
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from rrlhf.environment import SHARDING
from rrlhf.progress import is_main_process

Part = TypeVar("Part")


def mesh_of(engine: Accelerator) -> DeviceMesh | None:
    """Return the processes over which weights are spread; None where each has all of them."""
    return init_device_mesh(engine.device.type, (engine.num_processes,)) if _are_spread(engine) else None


def reads_weights(engine: Accelerator) -> bool:
    """Whether this process reads a model's weights: where they are spread, the others have theirs from the main one."""
    return engine.is_main_process or not _are_spread(engine)


def loading_device(engine: Accelerator) -> torch.device:
    """Return where a model is before it trains: on its device, or where it is spread from; else as shapes alone."""
    if _are_spread(engine):
        return torch.device("cpu" if engine.is_main_process else "meta")
    return torch.device(engine.device)


def _are_spread(engine: Accelerator) -> bool:
    return engine.num_processes > 1 and os.environ.get(SHARDING) == "full"


def spread(parts: Iterable[nn.Module], mesh: DeviceMesh) -> None:
    """Have every process keep its share of each part alone, on its device, in place; inner parts first."""
    for part in parts:
        _send(part, torch.device(mesh.device_type))
        fully_shard(part, mesh=mesh, reshard_after_forward=True)


def _send(part: nn.Module, device: torch.device) -> None:
    """Give all processes the main one's weights and buffers of a part, but for those that are spread, in place."""
    sent: dict[Tensor, Tensor] = {}
    for module in part.modules():
        for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            if isinstance(tensor, DTensor):
                continue
            if tensor not in sent:
                data = tensor.detach().to(device) if is_main_process() else torch.empty_like(tensor, device=device)
                distributed.broadcast(data, 0)
                is_weight = isinstance(tensor, nn.Parameter)
                sent[tensor] = nn.Parameter(data, tensor.requires_grad) if is_weight else data
            setattr(module, name, sent[tensor])


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor as it is; of one that is spread the main process gets all of it, in the host's memory."""
    if not isinstance(tensor, DTensor):
        return tensor
    gathered = tensor.full_tensor()
    return gathered.cpu() if is_main_process() else gathered.new_empty(0)


def share_of(tensor: Tensor, weight: Tensor) -> Tensor:
    """Return this process's share of a tensor that belongs to a weight; as it is where that is whole."""
    if not isinstance(weight, DTensor) or tensor.shape != weight.shape:
        return tensor
    return distribute_tensor(tensor.to(weight.device), weight.device_mesh, weight.placements, src_data_rank=None)


def whole_state(network: Any) -> dict[str, Tensor] | None:
    """Return what the main process saves of a network whose weights are spread; None where they are not."""
    if not any(isinstance(weight, DTensor) for weight in network.parameters()):
        return None
    network.tie_weights()
    known = {id(weight): whole(weight.detach()) for weight in (*network.parameters(), *network.buffers())}
    return {name: known[id(weight)] for name, weight in network.state_dict(keep_vars=True).items()}


def most(number: int, device: torch.device) -> int:
    """Return the largest of the numbers that the processes of this launch have."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return number
    found = torch.tensor(number, device=device)
    distributed.all_reduce(found, distributed.ReduceOp.MAX)
    return int(found)


def in_step(parts: Sequence[Part], device: torch.device) -> list[tuple[Part, bool]]:
    """Return parts, each with whether it counts: as many in all processes, the last again where there are fewer."""
    return [(parts[min(number, len(parts) - 1)], number < len(parts)) for number in range(most(len(parts), device))]


def shares(engine: Accelerator, rows: list[Part], size: int) -> list[tuple[list[Part], bool]]:
    """Return this process's share of rows, `size` at a time, with whether it counts; all have equally many parts."""
    mine, of_first = rows[engine.process_index :: engine.num_processes], len(rows[:: engine.num_processes])
    return [(mine[start : start + size] or rows[:1], start < len(mine)) for start in range(0, of_first, size)]
