"""Checks of the arguments of optimizers that torch lacks, in torch's words."""

from __future__ import annotations

import numbers
from typing import Any

import torch

NAMES = {"lr": "learning rate", "eps": "epsilon value"}


def check_nonnegative(**arguments: Any) -> None:
    """ValueError that names the first one which is negative or NaN, or TypeError where it is no number."""
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor) and name == "lr":
            if value.numel() != 1:
                raise ValueError("Tensor lr must be 1-element")
        elif not isinstance(value, numbers.Real):
            raise TypeError(f"{name} must be a number, got {value!r}")
        if not value >= 0:
            raise ValueError(f"Invalid {NAMES.get(name, name + ' value')}: {value}")


def check_betas(betas: Any, count: int) -> None:
    """ValueError that names the first of ``count`` betas outside [0, 1), TypeError for something else."""
    if not isinstance(betas, (tuple, list)) or len(betas) != count:
        raise TypeError(f"betas must be {count} numbers from 0 to below 1, got {betas!r}")
    for index, beta in enumerate(betas):
        if not isinstance(beta, numbers.Real):
            raise ValueError(f"Invalid beta parameter at index {index}: {beta!r}, which is no number")
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"Invalid beta parameter at index {index}: {beta}")
