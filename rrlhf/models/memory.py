"""What language models take of memory, found by running them on tensors that have a shape and nothing in them.

No formula says what a layer of any make keeps for its backward pass, but the layer does: the passes below are those of
training and sampling, and what they allocate is counted as it comes and goes. All rows are as long as they may be.
"""

import weakref
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from rrlhf.models.layers import ages, grow, prefill
from rrlhf.models.load import LanguageModel
from rrlhf.models.processes import trained_weights
from rrlhf.models.rollout import draw
from rrlhf.models.top import PolicyTop

FEW = 3  # layers that are run for all


class Rows(NamedTuple):
    """A batch of rows of the same lengths, in tokens."""

    batch: int
    prompt: int
    response: int

    @property
    def tokens(self) -> list[list[int]]:
        """The rows themselves; no two begin alike, so nothing of them is shared."""
        return [[row, *[0] * (self.prompt + self.response - 1)] for row in range(self.batch)]


class Sampling(NamedTuple):
    """What sampling takes, bytes."""

    cache: int  # keys and values, or whatever a make remembers, of rows in full length
    first: int  # at most, with the cache, while the prompts are read
    last: int  # at most, beside the cache, while the last token is drawn


class Allocated(TorchDispatchMode):
    """Counts the bytes that are allocated inside this context, now and at most."""

    def __init__(self, before: Iterable[Tensor]) -> None:
        """Take what was there before, which does not count."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.now: int = 0
        self.peak: int = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in before}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._count, result)
        return result

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        address, size = storage._cdata, storage.nbytes()
        if address not in self._known:
            self._known.add(address)
            weakref.finalize(storage, self._release, address, size)
            self.now += size
            self.peak = max(self.peak, self.now)

    def _release(self, address: int, size: int) -> None:
        self._known.discard(address)
        self.now -= size


def size(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of tensors, each counted once."""
    return sum(tensor.numel() * tensor.element_size() for tensor in {id(each): each for each in tensors}.values())


class Gathered(NamedTuple):
    """What a process has beside its share of weights that are spread (shards.py), while some of them run; bytes."""

    weights: int
    gradients: int  # of what trains


def gathered(top: PolicyTop, below: Sequence[nn.Module]) -> Gathered:
    """Return what is gathered at once of a policy, and of what is below it.

    That is what it has around its layers, and the largest layer twice: as it came and as it is used, or that which runs
    and the next. Of its gradients: those that come, and those of the layer before, which are sent.
    """
    weights = [size(layer.parameters()) for layer in top.apart]
    trained = [size(weight for weight in layer.parameters() if weight.requires_grad) for layer in top.apart]
    around, trained_around = size(top.parameters()) - sum(weights), size(trained_weights(top)) - sum(trained)
    largest = max(*weights, *(size(layer.parameters()) for layer in below))
    return Gathered(around + 2 * largest, trained_around + 2 * max(trained))


def make_runnable(*modules: nn.Module) -> None:
    """Give modules on the meta device empty tensors that operations treat as those of a processor, in place."""
    made: dict[int, Tensor] = {}
    for module in (part for each in modules for part in each.modules()):
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is not None and tensor.device.type == "meta":
                    held[name] = made.setdefault(id(tensor), _empty(tensor))  # type: ignore[assignment]


class Pass(NamedTuple):
    """What a pass takes at most, bytes, and how much of it each layer adds."""

    peak: int
    layer: int


def training(modules: Sequence[nn.Module], loss: Callable[[], Tensor]) -> int:
    """Return what a forward and a backward pass take at most, beside weights and gradients."""
    weights = [weight for module in modules for weight in module.parameters()]
    for weight in weights:
        weight.grad = _empty(weight.data) if weight.requires_grad else None
    allocated = Allocated(weights + [weight.grad for weight in weights if weight.grad is not None])
    with allocated:
        loss().backward()
    return allocated.peak


@torch.no_grad()
def reading(modules: Sequence[nn.Module], read: Callable[[], object]) -> int:
    """Return what a pass without gradients takes at most; how many layers it goes through makes no difference."""
    allocated = Allocated(weight for module in modules for weight in module.parameters())
    with allocated:
        read()
    return allocated.peak


def through_all(layers: int, taken: Callable[[int], int]) -> Pass:
    """Return what a pass through so many layers takes, of which each adds the same.

    taken: what one through a few of them takes; Python needs seconds for all layers of a large model.
    """
    if layers <= FEW:
        return Pass(taken(layers), taken(layers) // layers)
    fewer, few = taken(FEW - 1), taken(FEW)
    return Pass(few + (layers - FEW) * (few - fewer), few - fewer)


@torch.no_grad()
def sampling(language: LanguageModel, rows: Rows, kept: int) -> Sampling:
    """Return what it takes to sample a response to each row's prompt, and keep the states of so many layers."""
    if not language.by_layers:
        return _sampling_whole(language, rows)
    model = language.network.model
    every = model.layers
    found = {}
    for depth in {min(FEW - 1, len(every)), min(FEW, len(every))}:
        model.layers = every[:depth]
        found[depth] = _sampling(language.network, rows, (*range(min(kept, depth)),))
    model.layers = every
    parts = ({depth: some[part] for depth, some in found.items()} for part in range(3))
    return Sampling(*(through_all(len(every), each.__getitem__).peak for each in parts))


def _sampling(network: Any, rows: Rows, keep: tuple[int, ...]) -> Sampling:
    from transformers import DynamicCache

    remembered, layers = DynamicCache(), len(network.model.layers)
    first, last = Allocated(network.parameters()), Allocated(network.parameters())
    with first:
        prefill(network, rows._replace(response=0).tokens, layers, DynamicCache(), keep)
    with last:
        prefill(network, rows.tokens, layers, remembered)
        kept = last.peak = last.now
        at = torch.full((rows.batch,), rows.prompt + rows.response)
        age = ages(torch.full((rows.batch,), rows.prompt), rows.prompt, rows.response + 1) + rows.response
        state, _ = grow(network, at * 0, at, age, remembered, keep)
        draw(network.lm_head(network.model.norm(state)).float(), torch.rand(rows.batch), 1.0)
    return Sampling(kept, first.peak, last.peak - kept)


def _sampling_whole(language: LanguageModel, rows: Rows) -> Sampling:
    network = language.network
    first, last = Allocated(network.parameters()), Allocated(network.parameters())
    with first:
        network(torch.tensor(rows._replace(response=0).tokens), use_cache=True, logits_to_keep=1)
    with last:
        left = network(torch.tensor(rows.tokens), use_cache=True, logits_to_keep=1)
        kept = last.peak = last.now
        draw(left.logits[:, -1].float(), torch.rand(rows.batch), 1.0)
    return Sampling(kept, first.peak, last.peak - kept)


def states(rows: Rows, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return empty states of rows, [rows, tokens, width]."""
    with _shapes_only():
        return torch.empty(rows.batch, rows.prompt + rows.response, width, dtype=dtype)


def _empty(tensor: Tensor) -> Tensor:
    with _shapes_only():
        empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
    return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty


@cache
def _shapes_only() -> FakeTensorMode:
    """Tensors of one such mode alone work together; numbers that are known, such as lengths, stay what they are."""
    return FakeTensorMode(allow_non_fake_inputs=True)
