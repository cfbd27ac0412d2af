"""Gradients that are added up where they stay, beside autograd."""

from __future__ import annotations

import torch
from torch import Tensor


class Gradients:
    """Adds to weights' `grad` in place, and keeps that memory from step to step.

    Handed to autograd, every gradient of a matrix would be new memory, which the system fills with zeros page by page.
    """

    def __init__(self) -> None:
        self._made: set[Tensor] = set()
        self._spare: dict[Tensor, Tensor] = {}

    def product(self, weight: Tensor, g: Tensor, x: Tensor) -> None:
        """Add g' x, the gradient by W of y = x W'."""
        if weight.requires_grad:
            if weight.grad is None:
                torch.mm(g.t(), x, out=self._new(weight))
            else:
                weight.grad.addmm_(g.t(), x)

    def sum(self, weight: Tensor, g: Tensor) -> None:
        """Add g."""
        if weight.requires_grad:
            if weight.grad is None:
                self._new(weight).copy_(g)
            else:
                weight.grad.add_(g)

    def rows(self, weight: Tensor, index: Tensor, g: Tensor) -> None:
        """Add g to the rows of `index`."""
        if weight.requires_grad:
            grad = self._new(weight).zero_() if weight.grad is None else weight.grad
            grad.index_add_(0, index, g)

    def _new(self, weight: Tensor) -> Tensor:
        grad = self._spare.pop(weight, None)
        weight.grad = torch.empty_like(weight) if grad is None else grad
        self._made.add(weight)
        return weight.grad

    def clear(self) -> None:
        """Have the weights without gradients, as `zero_grad` does, whose memory is kept."""
        self._spare |= {weight: weight.grad for weight in self._made if weight.grad is not None}
        for weight in self._made:
            weight.grad = None
        self._made.clear()

    def release(self) -> None:
        """Give the memory back."""
        self._spare.clear()
