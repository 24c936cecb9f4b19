"""The checks of settings: ``check(name, value)`` returns the value to keep, or raises TypeError or ValueError."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from typing import Any

import torch


def number(name: str, value: Any) -> float:
    if isinstance(value, torch.Tensor):
        raise TypeError(f"{name} must be a Python number, got a tensor: pass {name}=float(value)")
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if math.isnan(value):
        raise ValueError(f"Invalid {name}: {value}")
    return float(value)


def norm(name: str, value: Any) -> float | None:
    if value is None:
        return None
    value = number(name, value)
    if value <= 0:
        raise ValueError(f"Invalid {name}: {value}; give a positive number, or None for no clipping")
    return value


def clipping(name: str, value: Any) -> float | None:
    value = norm(name, value)
    if value == math.inf:
        raise ValueError(f"Invalid {name}: {value}; give a finite number, or None for no clipping")
    return value


def decay(name: str, value: Any) -> float | None:
    if value is None:
        return None
    value = number(name, value)
    if not 0 <= value < 1:
        raise ValueError(f"Invalid {name}: {value}; give a number of at least 0 and below 1, or None for no averages")
    return value


def limits(name: str, value: Any) -> Any:
    if value is None:
        return None
    if not isinstance(value, (tuple, list)):
        return norm(name, value)
    if len(value) != 2:
        raise ValueError(f"Invalid {name}: {value}; give one limit, or a pair (low, high) where None means no limit")
    low, high = (None if limit is None else number(name, limit) for limit in value)
    if low is not None and high is not None and low > high:
        raise ValueError(f"Invalid {name}: {value}; the lower limit lies above the upper one")
    return None if low is None and high is None else (low, high)


def state_dtype(name: str, value: Any) -> Any:
    if value in ("float32", "bfloat16"):
        return getattr(torch, value)
    if value is None or value in (torch.float32, torch.bfloat16) or value == "8bit":
        return value
    raise ValueError(f"Invalid {name}: {value!r}; choose torch.float32, torch.bfloat16, '8bit' or None")


def seed(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be a whole number, got {value!r}")
    if not 0 <= value < 2**63:
        raise ValueError(f"Invalid {name}: {value}; give a number from 0 to 2**63 - 1")
    return int(value)


def flag(name: str, value: Any) -> bool:
    """The check of a setting that is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return value


def flat_grads(name: str, value: Any) -> bool | str:
    if not isinstance(value, bool) and value != "zeroed":
        raise TypeError(f"{name} must be True, False or 'zeroed', got {value!r}")
    return value


def one_of(*choices: str | int | None) -> Callable[[str, Any], Any]:
    """The check of a setting that is one of these."""
    *others, last = map(repr, choices)

    def check(name: str, value: Any) -> Any:
        if isinstance(value, bool) or value not in choices:  # True is equal to 1
            raise ValueError(f"Invalid {name}: {value!r}; choose {', '.join(others)} or {last}")
        return value

    return check


backend = one_of("torch", "triton", None)


def group(name: str, value: Any) -> Any:
    groups = torch.distributed.is_available() and (torch.distributed.ProcessGroup, torch.distributed.DeviceMesh)
    if value is None or value == "world" or (groups and isinstance(value, groups)):
        return value
    raise TypeError(f"{name} must be None, 'world', a ProcessGroup or a DeviceMesh, got {value!r}")
