"""Checks of arguments, in torch's words: of optimizers that torch lacks, of parameter groups, and of learning rates,
whoever set them."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import Any

import torch

NAMES = {"lr": "learning rate", "eps": "epsilon value"}


def is_number(value: Any) -> bool:
    """Whether it is a number of Python's or NumPy's, or an array of NumPy's with no dimensions."""
    return isinstance(value, numbers.Real) or (getattr(value, "shape", None) == () and hasattr(value, "__float__"))


def check_nonnegative(**arguments: Any) -> None:
    """ValueError that names the first one which is negative or NaN, or TypeError where it is no number."""
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor) and name == "lr":
            if value.numel() != 1:
                raise ValueError("Tensor lr must be 1-element")
        elif not isinstance(value, numbers.Real) and not (name == "lr" and is_number(value)):
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


def check_group(optimizer: Any, param_group: dict[str, Any]) -> None:
    """ValueError or TypeError for options with which a group cannot be added to an optimizer of ours."""
    optimizer._settings.refuse_in_group(param_group, optimizer.defaults)
    group = {**optimizer.defaults, **param_group}
    # torch's own classes look at theirs: in a group they let a negative one pass, and so do ours.
    if "lr" in group and optimizer.step_of_torch is None:
        check_nonnegative(lr=group["lr"])
    for key, value in group.items():
        if isinstance(value, float) and math.isnan(value):
            raise ValueError(f"Invalid {key}: {value}; hyperparameters must be numbers")
    optimizer.rule(group)  # raises where the options contradict the settings
    lr = group.get("lr")
    if isinstance(lr, float) and math.isinf(lr):
        raise ValueError(f"Invalid learning rate: {lr}; give a finite number")


def check_rates(optimizer: Any, groups: Sequence[dict[str, Any]]) -> None:
    """ValueError, or torch's RuntimeError for tensors, if a step cannot go on with a group's learning rate. What only a
    device knows is not looked at."""
    for number, group in enumerate(groups):
        lr = group.get("lr", 0.0)
        # Runs at every step.
        if type(lr) is not float:
            lr = _host_rate(optimizer, number, group, lr)
        if not math.isfinite(lr):
            raise ValueError(
                f"Invalid learning rate: {lr} in group {number}; it must be a finite number. What set it, a scheduler?"
            )


def _host_rate(optimizer: Any, number: int, group: dict[str, Any], lr: Any) -> float:
    """A learning rate that is no Python float, as one; 0 if nobody may wait for it."""
    if not isinstance(lr, torch.Tensor):
        if not is_number(lr):
            raise TypeError(f"the learning rate of group {number} must be a number, got {lr!r}")
        return float(lr)
    if lr.numel() != 1:
        raise ValueError(f"Tensor lr must be 1-element, got shape {tuple(lr.shape)} in group {number}")
    capturable = optimizer.is_capturable(group)
    if lr.is_cpu:
        return 0.0 if capturable else float(lr)
    if lr.is_meta or (capturable and group["params"] and group["params"][0].device != lr.device):
        raise RuntimeError(
            f"the learning rate of group {number} is a tensor on {lr.device}, its parameters are on "
            f"{group['params'][0].device}: put it there, or on the CPU"
        )
    return 0.0
