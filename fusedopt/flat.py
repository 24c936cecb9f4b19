"""Flat index spaces: many tensors side by side, in parallel buffers with one layout.

Views that others may see own their storage (a DLPack alias at offset 0), so that saving, pickling or
freeing one never touches the whole buffer. Where DLPack cannot do that they are plain views.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from . import upload
from .devices import has_addresses

ALIGNMENT = 256
"""Elements between possible starts of tensors in a buffer that kernels read: a multiple of every vector width."""


def is_dense(tensor: Tensor) -> bool:
    """Whether its elements fill one piece of memory, each once, in whatever order of dimensions."""
    return tensor.is_contiguous() or torch.ops.aten.is_non_overlapping_and_dense(tensor)


def strides_of_state(p: Tensor) -> tuple[int, ...]:
    """Its parameter's, where these fill memory, as torch's states have them; else those of a contiguous tensor."""
    return p.stride() if is_dense(p) else torch.empty(p.size(), device="meta").stride()


def memory_order(tensor: Tensor) -> Tensor:
    """A dense tensor's elements as one dimension, in the order of its memory."""
    tensor = tensor.detach()
    return tensor if tensor.stride() == (1,) else tensor.as_strided((tensor.numel(),), (1,))


def contiguous(tensor: Tensor) -> Tensor:
    """A dense tensor, or where its dimensions are in another order its elements as one dimension: torch's fused CPU
    kernels copy what is not contiguous, which takes three times as long as their update."""
    return tensor if tensor.is_contiguous() else memory_order(tensor)


def alias(part: Tensor) -> Tensor:
    """The same memory as a tensor whose storage begins and ends with it, where there can be one."""
    if part.numel() == 0:
        return part.clone()
    if not has_addresses(part.device):
        return part
    return torch._C._from_dlpack(torch._C._to_dlpack(part))


class Space:
    """One flat index space over ``params``, and its buffers, one per role ("exp_avg", "param", ...).

    The first ``packed`` tensors lie side by side without gaps; the others start at multiples of
    ALIGNMENT elements. Gaps hold zeros, and stay zero.
    """

    def __init__(self, params: Sequence[Tensor], packed: int, capturable: bool = False):
        self.device = params[0].device
        self.capturable = capturable
        """Whether step counts and their like are on the device too, instead of on the host."""
        self.dtype = params[0].dtype
        self.sizes = [p.size() for p in params]
        self.strides = list(map(strides_of_state, params))
        self.offsets: list[int] = []
        self.packed = packed
        self.packed_size = end = 0
        for index, p in enumerate(params):
            start = end if index < packed else -(-end // ALIGNMENT) * ALIGNMENT
            self.offsets.append(start)
            end = start + p.numel()
            if index < packed:
                self.packed_size = end
        self.size = -(-end // ALIGNMENT) * ALIGNMENT
        self.buffers: dict[str, Tensor] = {}
        self.per: dict[str, int] = {}
        """How many elements share one number of a buffer."""
        self.numbers: dict[str, Tensor] = {}
        """What is one number per tensor: step counts and their like."""
        self.arrays: dict[str, np.ndarray] = {}
        """The bytes of ``numbers``, where these are on the host."""
        self.copies: dict[tuple[str, torch.dtype], Tensor] = {}
        self.copies_apart: dict[tuple[str, torch.dtype], list[Tensor]] = {}
        """The single tensors in ``copies``."""
        self.unclaimed: dict[str, list[Tensor | None]] = {}
        """By role and index: views made all at once, which is faster, until somebody claims them."""
        self.lent: dict[str, tuple[StorageWeakRef, torch.dtype, int]] = {}
        """The buffers that live as long as views of them that were claimed: memory, dtype and elements."""

    def allocate(self, role: str, dtype: torch.dtype, per: int = 1) -> None:
        """A buffer with one number ``per`` so many elements."""
        self.buffers[role] = torch.zeros(self.size // per, dtype=dtype, device=self.device)
        self.per[role] = per
        if per == 1:
            views = self.parts(self.buffers[role], len(self.sizes))
        else:
            views = map(self.view, itertools.repeat(role), range(len(self.sizes)))
        self.unclaimed[role] = list(map(alias, views))

    def allocate_numbers(self, role: str, dtype: torch.dtype) -> None:
        self.numbers[role] = torch.zeros(len(self.sizes), dtype=dtype, device=self.device if self.capturable else "cpu")
        if not self.capturable:
            self.arrays[role] = self.numbers[role].view(torch.uint8).numpy()
        self.unclaimed[role] = list(map(alias, self.numbers[role].unbind()))

    def claim(self, role: str, index: int) -> Tensor:
        """The ``index``-th tensor in that role for others to see: with storage of its own."""
        views = self.unclaimed[role]
        view, views[index] = views[index], None
        return alias(self.view(role, index)) if view is None else view

    def view(self, role: str, index: int) -> Tensor:
        """The ``index``-th tensor in that role: its number, or what has its parameter's shape and strides."""
        if role in self.numbers:
            return self.numbers[role][index]
        if self.per[role] > 1:
            # Of tensors that are not packed, and so start at multiples of ALIGNMENT.
            first, last = self.offsets[index] // self.per[role], -(-self.end(index) // self.per[role])
            return self.buffers[role][first:last]
        return self.part_like(self.buffers[role], index)

    def packed_copies(self, role: str, dtype: torch.dtype) -> Tensor:
        """A buffer for copies of the packed tensors that one step works on."""
        if (role, dtype) not in self.copies:
            self.copies[role, dtype] = torch.zeros(self.packed_size, dtype=dtype, device=self.device)
        return self.copies[role, dtype]

    def packed_copy(self, role: str, dtype: torch.dtype, index: int) -> Tensor:
        """The copy of the ``index``-th tensor there."""
        if (role, dtype) not in self.copies_apart:
            self.copies_apart[role, dtype] = self.parts(self.packed_copies(role, dtype), self.packed)
        return self.copies_apart[role, dtype][index]

    def part_like(self, buffer: Tensor, index: int) -> Tensor:
        return buffer.as_strided(self.sizes[index], self.strides[index], self.offsets[index])

    def parts(self, buffer: Tensor, count: int) -> list[Tensor]:
        """The first ``count`` tensors, in a buffer that has no others. Autograd does not know them as views, which
        makes them smaller, and faster to make."""
        lengths = list(map(torch.Size.numel, self.sizes[:count]))
        starts = [*self.offsets[1:count], len(buffer)]
        gaps = [start - (offset + length) for start, offset, length in zip(starts, self.offsets, lengths)]
        pieces = torch.unsafe_split_with_sizes(buffer, list(itertools.chain.from_iterable(zip(lengths, gaps))))[::2]
        laid_out = zip(pieces, self.sizes, self.strides)
        return [x if strides == (1,) else x.as_strided(size, strides) for x, size, strides in laid_out]

    def storages(self) -> list[torch.UntypedStorage]:
        """The buffers' memory. How many tensors use a buffer is in torch's own count: every view given out is one of
        them, until it is freed or somebody gives it other memory (``view.data = ...``). One number tells of all,
        without asking each for its address."""
        return [b.untyped_storage() for b in (*self.buffers.values(), *self.numbers.values())]

    def lend(self, roles: Iterable[str]) -> None:
        """Hold these buffers no longer."""
        for role in self.buffers.keys() & roles:
            buffer = self.buffers.pop(role)
            self.unclaimed[role] = [None] * len(self.sizes)
            self.lent[role] = StorageWeakRef(buffer.untyped_storage()), buffer.dtype, len(buffer)

    def take_back(self) -> None:
        """Hold those again of which views are left."""
        for role, (memory, dtype, size) in self.lent.items():
            storage = torch.UntypedStorage._new_with_weak_ptr(memory.cdata)
            if storage is None:
                del self.unclaimed[role], self.per[role]
            else:
                self.buffers[role] = torch.empty(0, dtype=dtype, device=self.device).set_(storage, 0, (size,), (1,))
        self.lent = {}

    def free_later(self) -> None:
        """Before others take its place."""
        for buffer in (*self.buffers.values(), *self.numbers.values()):
            upload.free_later(buffer)

    def end(self, index: int) -> int:
        return self.offsets[index] + self.sizes[index].numel()
