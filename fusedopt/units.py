"""Adaptive gradient clipping (Brock et al., arXiv 2102.06171): by the units of each parameter.

    g <- g min(1, clipping max(|p|, eps) / |g|)        norms of each unit

A unit is what belongs to one index of the first dimension, an output row or filter; scalars and vectors are one unit
each, as in timm's ``adaptive_clip_grad``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .devices import sum_dtype
from .shards import is_piece

PART = 16 * 1024
"""Elements of a unit that one program adds up, in tiles of 1024."""

EPS = 1e-3
"""The least norm that a unit's parameters count with, as in the paper."""


def clip_runs(runs: Iterable[Any], clipping: float, factor: float, dtype: torch.dtype) -> None:
    """Clip the gradients of a torch executor, which ``factor`` is still to multiply: where they are, or copies of them
    in the dtype of arithmetic."""
    for run in runs:
        run.grads = [g.to(dtype) for g in run.grads]
        members = iter(run.members)
        for piece, sizes in zip(run.grads, run.sizes):
            start = 0
            for size, m in zip(sizes, members):
                shape = m.param.shape
                g = piece if piece.shape == shape else piece[start:].as_strided(shape, m.place.strides)
                g.mul_(_factors(g, m.param, clipping, factor))
                start += size


def _factors(g: Tensor, p: Tensor, clipping: float, factor: float) -> Tensor:
    """min(1, clipping max(|p|, eps) / |factor g|) by unit."""
    dims = tuple(range(1, g.dim())) or None
    wide = sum_dtype(g.device)
    g_norm, p_norm = (torch.linalg.vector_norm(x.detach(), dim=dims, keepdim=True, dtype=wide) for x in (g, p))
    # The same operations as in kernels/units.py: a zero gradient makes it infinite, and NaN stays NaN.
    return (clipping * p_norm.clamp(min=EPS) / g_norm / factor).clamp(max=1.0).to(g.dtype)


def refuse_shards(owner: Any, where: Any) -> None:
    """RuntimeError where this rank holds but parts of a parameter's units."""
    # Not is_shard(0), which the _StridedShard of fully_shard with tensor parallelism denies.
    by_rows = owner.dim() > 1 and all(x.is_replicate() or x.dim == 0 for x in getattr(owner, "placements", ()))
    if is_piece(owner) or not by_rows:
        raise RuntimeError(
            f"adaptive_grad_clip needs the norms of whole rows or, of scalars and vectors, of all, and this rank holds "
            f"only a part of {where}: parameters of two dimensions and more that are sharded by rows are possible; put "
            "the others into an optimizer of their own without it, or clip by max_grad_norm"
        )


class UnitTables:
    """The tables from which the kernel of the ratios knows which program adds which part of which unit, and the memory
    for its sums and ratios."""

    def __init__(self, params: Sequence[Tensor], dtype: torch.dtype, device: torch.device):
        layouts = [_layout(p) for p in params]
        counts = np.array([count for _, count in layouts])
        sizes = np.array([p.numel() for p in params]) // counts
        parts = np.where(sizes > 0, -(-sizes // PART), 0)
        first = np.cumsum(counts) - counts
        table = np.stack([first, [stride for stride, _ in layouts], counts], axis=1)
        per_tensor = counts * parts
        tensor = np.repeat(np.arange(len(params)), per_tensor)
        place = np.arange(per_tensor.sum()) - np.repeat(np.cumsum(per_tensor) - per_tensor, per_tensor)
        programs = np.stack([tensor, place // parts[tensor], place % parts[tensor], parts[tensor]], axis=1)
        self.programs = len(programs)
        self.table = torch.from_numpy(table.astype(np.int64)).to(device)
        self.parts = torch.from_numpy(programs.astype(np.int32)).to(device)
        self.partials = torch.zeros(len(programs), 2, dtype=torch.float64, device=device)
        self.tickets = torch.zeros(int(counts.sum()), dtype=torch.int32, device=device)
        self.ratios = torch.ones(int(counts.sum()), dtype=dtype, device=device)


def _layout(p: Tensor) -> tuple[int, int]:
    """The elements of each piece of a unit in memory, and the number of units."""
    if p.dim() < 2 or p.numel() == 0 or p.size(0) == 1:
        return max(p.numel(), 1), 1
    return p.stride(0), p.size(0)
