"""Numbers that the host knows, and numbers that only a device does.

With ``capturable=True`` the step count is on the device, the learning rate may be, and nobody waits for them: they are
*columns*, float64 tensors [rows, 1] with a row per parameter. The formulas of hyperparameters (``hyper``, ``lr`` and
their like) are written once for Python numbers and for columns. Operators work on both; what Python does with numbers
alone is done by these functions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

Number = Any
"""A float, or a column."""


def is_column(x: Any) -> bool:
    # A learning rate that a user gives as a tensor has no dimensions, or one.
    return isinstance(x, Tensor) and x.dim() == 2


def number(x: Any) -> Number:
    """``float(x)``; a column stays one."""
    if type(x) is float:
        return x
    return x.double() if is_column(x) else float(x)


def where(condition: Any, a: Number, b: Number) -> Number:
    """``a if condition else b``, row by row. Both are computed."""
    return torch.where(condition, a, b) if is_column(condition) else a if condition else b


def maximum(a: Number, least: float) -> Number:
    """``max(a, least)``"""
    return a.clamp(min=least) if is_column(a) else max(a, least)


def minimum(a: Number, most: float) -> Number:
    """``min(a, most)``"""
    return a.clamp(max=most) if is_column(a) else min(a, most)


def product(x: Tensor, factor: Number) -> Tensor:
    """``x * factor`` in the dtype of x, one of a rule's scalars, and so rounded as in torch."""
    return x * factor.to(x.dtype) if is_column(factor) else x * factor


def tensor(x: Number, dtype: torch.dtype | None = None) -> Tensor:
    """x as one of a rule's scalars, in torch's default dtype or another."""
    if is_column(x):
        return x.to(dtype or torch.get_default_dtype())
    return torch.scalar_tensor(x, dtype=dtype, device="cpu")
