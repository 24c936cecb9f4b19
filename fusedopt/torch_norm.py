"""The norm of gradients in plain torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from .blocks import for_threads
from .clipping import hypot
from .widened import COPIED, widened

NORM_ROW = 1024
"""torch's float32 norm adds in float32: over 25M elements it is off by 1e-3, over rows of 1024 by 1e-7."""

MANY = 16
"""Tiny tensors that are worth joining: a copy costs a third of a norm of one's own."""


def norm(tensors: Sequence[Tensor], dtype: torch.dtype, compute_dtype: torch.dtype) -> float:
    """The norm of all elements of dense tensors; not finite if and only if one of them is not."""
    # 16-bit elements are added one by one, so that the error is larger sooner.
    longest = NORM_ROW if dtype.itemsize < 4 else 16 * NORM_ROW
    norms: list[Tensor] = []
    short: list[Tensor] = []
    for g in _joined(tensors) if len(tensors) >= MANY else tensors:
        rows, rest = divmod(g.numel(), NORM_ROW) if g.numel() >= longest else (0, 0)
        if not rows:
            short.append(g)
            continue
        # The order of elements does not matter, and as_strided is one call.
        matrix = g.as_strided((rows, NORM_ROW), (NORM_ROW, 1))
        norms += [torch.linalg.vector_norm(x, dim=1, dtype=compute_dtype) for x in _readable(matrix, compute_dtype)]
        if rest:
            short.append(g.as_strided((rest,), (1,), g.storage_offset() + rows * NORM_ROW))
    if short:
        norms.append(torch.stack(torch._foreach_norm(short, 2, dtype=compute_dtype)))
    if not norms:
        return 0.0
    # On the host, since some accelerators have no float64.
    norm = torch.linalg.vector_norm(torch.cat(norms).cpu(), dtype=torch.float64).item()
    if not 1e-16 < norm < 1e150:
        # Squares that the dtype may not hold: once more in float64, relative to the largest element.
        norm = hypot(list(map(_norm_of_any, tensors)))
    return norm


def _readable(matrix: Tensor, dtype: torch.dtype) -> Iterable[Tensor]:
    """Its rows, on a CPU in the wider dtype: there torch converts and adds elements one by one."""
    if matrix.dtype == dtype or not matrix.is_cpu:
        return [matrix]
    return (widened([rows], dtype, "norm")[0] for rows in matrix.split(for_threads(COPIED) // NORM_ROW))


def _joined(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The same elements, with tiny tensors one behind the other where they can be concatenated."""
    by_shape: dict[torch.Size, list[Tensor]] = {}
    for x in tensors:
        by_shape.setdefault(x.shape, []).append(x)
    tiny: dict[torch.Size, list[Tensor]] = {}
    found = []
    for shape, alike in by_shape.items():
        if shape and shape.numel() < NORM_ROW:
            tiny.setdefault(shape[1:], []).extend(alike)
        else:
            found += alike
    for alike in tiny.values():
        found += [torch.cat(alike)] if len(alike) >= MANY else alike
    return found


def _norm_of_any(x: Tensor) -> float:
    largest = x.abs().max().item() if x.numel() else 0.0
    if not 0 < largest < math.inf:
        return largest
    return largest * torch.linalg.vector_norm(x.cpu().double() / largest).item()
