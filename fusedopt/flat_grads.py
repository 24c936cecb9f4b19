"""``flat_grads=True``: gradients that stay where they are, in one buffer per device and dtype.

backward adds to a gradient that is there. So views of a buffer, put there once, collect what follows at addresses that
never change: accumulation and CUDA graphs need no other, and one call zeroes all of them. With ``"zeroed"`` the step
does it, in the kernel that has just read them. The views are put there by the first ``zero_grad()``, or the first such
step, and not by the constructor: ``torch.distributed.checkpoint`` makes states to load into only where no parameter has
a gradient.
"""

from __future__ import annotations

from itertools import groupby
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from . import upload
from .flat import Space
from .groups import params_of
from .shards import is_distributed, is_piece


class Given(NamedTuple):
    """A parameter's place in a buffer, and what both were like when it was given."""

    view: Tensor
    buffer: Tensor
    address: int
    of: tuple

    def fits(self, p: Tensor) -> bool:
        return self.view.data_ptr() == self.address and self.of == _kind(p)


def check(optimizer: Any) -> None:
    """RuntimeError for distributed parameters, whose gradients belong to their engine."""
    if any(is_distributed(p) or is_piece(p) for p in params_of(optimizer)):
        raise RuntimeError(
            "flat_grads=True cannot keep the gradients of distributed parameters, which belong to their engine: leave "
            "it out"
        )


class FlatGrads:
    """The gradients of one optimizer. Built again where it is missing, so it is not copied or pickled with that."""

    def __init__(self) -> None:
        self.given: dict[Tensor, Given] = {}
        self.buffers: list[Tensor] = []
        self.versions: list[int] | None = None
        """The gradients' versions after a step that left zeros in all of them: one that still has its own is zero."""

    def step(self, optimizer: Any) -> None:
        """A step of the optimizer's engine that leaves zeros in the buffers, also if it skips the update. Whoever reads
        the gradients behind it finds these."""
        self.versions = None
        engine = optimizer._engine
        engine.owes_zeros = here = self._all_are_here([p for p in params_of(optimizer) if p.grad is not None])
        try:
            engine.step(optimizer)
        finally:
            engine.owes_zeros = False
        if not self.given:
            self.zero(optimizer)
        elif not here or any(executor.owes_zeros for executor in engine.executors):
            self._fill()
        else:
            self._note_writes()
        self.versions = self._versions()

    @torch._disable_dynamo
    def zero(self, optimizer: Any) -> None:
        """Zero all gradients, after giving a place to those that have none. Frozen parameters lose theirs: with zeros,
        momentum and weight decay would go on moving them. Those on the meta device and of lazy modules get a place
        once they have memory.

        Raises:
            RuntimeError: as ``check``.
        """
        params = []
        for p in params_of(optimizer):
            if p.requires_grad:
                params.append(p)
            else:
                p.grad = None
        # Once only: what the replay of a graph writes is not seen.
        versions, self.versions = self.versions, None
        if not self._all_are_here(params):
            check(optimizer)
            self._bring(params)
        elif versions is not None and versions == self._versions():
            return
        self._fill()

    def _fill(self) -> None:
        for buffer in self.buffers:
            buffer.zero_()
        self._note_writes()

    def _note_writes(self) -> None:
        """Tell autograd, which does not see them by itself."""
        torch.autograd.graph.increment_version([given.view for given in self.given.values()])

    def _versions(self) -> list[int] | None:
        """None while a graph is captured: its steps have not run yet, and will do so unseen."""
        if any(upload.capturing(buffer.device) for buffer in self.buffers):
            return None
        return [given.view._version for given in self.given.values()]

    def _all_are_here(self, params: list[Tensor]) -> bool:
        views = [given.view for given in self.given.values()]
        return (
            len(views) == len(params)
            and all(map(is_, self.given, params))
            and all(map(is_, [p.grad for p in params], views))
            and list(map(Tensor.data_ptr, views)) == [given.address for given in self.given.values()]
        )

    def _bring(self, params: list[Tensor]) -> None:
        kept = {p: self.given[p] for p in params if p in self.given and self.given[p].fits(p)}
        missing = [p for p in params if p not in kept and _has_memory(p) and not _is_lent(p.grad)]
        for _, alike in groupby(sorted(missing, key=_buffer), key=_buffer):
            kept |= self._place(list(alike))
        self.given = {p: kept[p] for p in params if p in kept}
        self.buffers = list({id(given.buffer): given.buffer for given in self.given.values()}.values())
        for p in params:
            if _is_lent(p.grad):
                p.grad.detach().zero_()
            elif p in self.given:
                p.grad = self.given[p].view

    def _place(self, params: list[Tensor]) -> dict[Tensor, Given]:
        space = Space(params, packed=0)
        space.allocate("grad", _dtype(params[0]))
        views = [space.claim("grad", index) for index in range(len(params))]
        return {p: Given(view, space.buffers["grad"], view.data_ptr(), _kind(p)) for p, view in zip(params, views)}


def _has_memory(p: Tensor) -> bool:
    return not (p.is_meta or is_lazy(p))


def _dtype(p: Tensor) -> torch.dtype:
    """Of its gradient: its own, unless another was asked for."""
    return p.grad_dtype or p.dtype


def _buffer(p: Tensor) -> tuple[str, str]:
    return str(p.device), str(_dtype(p))


def _kind(p: Tensor) -> tuple:
    return p.device, _dtype(p), p.shape, p.stride()


def _is_lent(grad: Tensor | None) -> bool:
    """Whether it is a part of somebody else's buffer."""
    return grad is not None and not grad.is_sparse and grad.untyped_storage().nbytes() > grad.nbytes
