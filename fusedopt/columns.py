"""Numbers that the host knows, and numbers that only a device does.

With ``capturable=True`` the step count is on the device, the learning rate may be, and nobody waits for them: they are
*columns*, float64 tensors [rows, 1] with a row per parameter, or the record of how a kernel is to make such a column.
The formulas of hyperparameters (``hyper``, ``lr`` and their like) are written once for Python numbers and for columns.
Operators work on both; what Python does with numbers alone is done by these functions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .recorded import Recorded

Number = Any
"""A float, or a column."""

Rounded = np.floating | Tensor | Recorded
"""One of a rule's scalars, in the dtype of its state. Where the host knows it: a number of NumPy, which calculates
faster than a 0-dim tensor of torch's, or such a tensor for a dtype that NumPy lacks. Otherwise a column."""


def is_column(x: Any) -> bool:
    # A learning rate that a user gives as a tensor has no dimensions, or one.
    return isinstance(x, Recorded) or (isinstance(x, Tensor) and x.dim() == 2)


def number(x: Any) -> Number:
    """``float(x)``; a column stays one."""
    if type(x) is float:
        return x
    return x.double() if is_column(x) else float(x)


def where(condition: Any, a: Number, b: Number) -> Number:
    """``a if condition else b``, row by row. Both are computed."""
    if isinstance(condition, Recorded):
        return condition.where(a, b)
    return torch.where(condition, a, b) if is_column(condition) else a if condition else b


def maximum(a: Number, least: float) -> Number:
    """``max(a, least)``"""
    return a.clamp(min=least) if is_column(a) else max(a, least)


def minimum(a: Number, most: float) -> Number:
    """``min(a, most)``"""
    return a.clamp(max=most) if is_column(a) else min(a, most)


def product(x: Rounded, factor: Number) -> Rounded:
    """``x * factor`` in the dtype of x, and so rounded as in torch."""
    if isinstance(x, np.floating):
        return x * type(x)(factor)
    return x * factor.to(x.dtype) if is_column(factor) else x * factor


def scalar(x: Number | Rounded, dtype: torch.dtype | None = None) -> Rounded:
    """x as one of a rule's scalars, in torch's default dtype or another."""
    dtype = dtype or torch.get_default_dtype()
    if is_column(x):
        return x.to(dtype)
    return NUMPY[dtype](x) if dtype in NUMPY else torch.scalar_tensor(x, dtype=dtype, device="cpu")


def like(x: Rounded, other: Rounded) -> Rounded:
    """x in the dtype of another scalar."""
    if type(x) is type(other) is not Tensor:
        return x
    return type(other)(float(x)) if isinstance(other, np.floating) else scalar(float(x), other.dtype)


def joined(scalars: Sequence[Rounded]) -> np.ndarray | Tensor:
    return np.array(scalars) if isinstance(scalars[0], np.floating) else torch.stack(scalars)


NUMPY = {torch.float32: np.float32, torch.float64: np.float64}
