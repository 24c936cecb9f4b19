"""What accelerators lack on which no kernel of ours runs."""

from __future__ import annotations

import functools

import torch

OURS = frozenset(("cpu", "cuda"))
"""Types of devices on which the package is tested: CUDA's and ROCm's GPUs, and the fallback."""


def has_addresses(device: torch.device) -> bool:
    """Whether DLPack can hand on a part of a buffer. On Apple's MPS an address stands for the whole buffer, and torch
    drops where in it the part begins."""
    return device.type in OURS


@functools.cache
def sum_dtype(device: torch.device) -> torch.dtype:
    """In which dtype to add up: float64, or float32 where a device lacks it, as MPS does and some of Intel's GPUs."""
    if device.type not in OURS:
        try:
            torch.zeros((), dtype=torch.float64, device=device)
        except (TypeError, RuntimeError):
            return torch.float32
    return torch.float64
