"""``flat_grads=True``: gradients that stay where they are, in one buffer per device and dtype.

backward adds to a gradient that is there. So views of a buffer, put there once, collect what follows at addresses that
never change: accumulation and CUDA graphs need no other, and one call zeroes all of them.
"""

from __future__ import annotations

from itertools import groupby
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .flat import Space, alias
from .shards import is_distributed


class Given(NamedTuple):
    """A parameter's place in a buffer, and what both were like when it was given."""

    view: Tensor
    address: int
    of: tuple

    def fits(self, p: Tensor) -> bool:
        return self.view.data_ptr() == self.address and self.of == _kind(p)


class FlatGrads:
    """The gradients of one optimizer. Built again where it is missing, so it is not copied or pickled with that."""

    def __init__(self) -> None:
        self.given: dict[Tensor, Given] = {}
        self.buffers: list[Tensor] = []

    def zero(self, optimizer: Any) -> None:
        """Zero all gradients, after giving a place to those that have none.

        Raises:
            RuntimeError: for distributed parameters, whose gradients belong to their engine.
        """
        params = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
        if not self._all_are_here(params):
            self._bring(params)
        for buffer in self.buffers:
            buffer.zero_()
        torch.autograd.graph.increment_version([given.view for given in self.given.values()])

    def _all_are_here(self, params: list[Tensor]) -> bool:
        views = [given.view for given in self.given.values()]
        return (
            len(views) == len(params)
            and all(map(is_, self.given, params))
            and all(map(is_, [p.grad for p in params], views))
            and list(map(Tensor.data_ptr, views)) == [given.address for given in self.given.values()]
        )

    def _bring(self, params: list[Tensor]) -> None:
        if any(is_distributed(p) or hasattr(p, "_fsdp_flattened") for p in params):
            raise RuntimeError(
                "flat_grads=True cannot keep the gradients of distributed parameters, which belong to their engine: "
                "leave it away"
            )
        kept = {p: self.given[p] for p in params if p in self.given and self.given[p].fits(p)}
        if not kept:
            self.buffers.clear()  # all have moved, to another device, say
        missing = [p for p in params if p not in kept and not _is_lent(p.grad)]
        for _, alike in groupby(sorted(missing, key=_buffer), key=_buffer):
            kept |= self._place(list(alike))
        self.given = {p: kept[p] for p in params if p in kept}
        for p in params:
            if _is_lent(p.grad):
                p.grad.detach().zero_()
            else:
                p.grad = self.given[p].view

    def _place(self, params: list[Tensor]) -> dict[Tensor, Given]:
        space = Space(params, packed=0)
        space.allocate("grad", params[0].dtype)
        self.buffers.append(space.buffers["grad"])
        views = [alias(space.view("grad", index)) for index in range(len(params))]
        return {p: Given(view, view.data_ptr(), _kind(p)) for p, view in zip(params, views)}


def _buffer(p: Tensor) -> tuple[str, str]:
    return str(p.device), str(p.dtype)


def _kind(p: Tensor) -> tuple:
    return p.device, p.dtype, p.shape, p.stride()


def _is_lent(grad: Tensor | None) -> bool:
    """Whether it is a part of somebody else's buffer."""
    return grad is not None and not grad.is_sparse and grad.untyped_storage().nbytes() > grad.nbytes
