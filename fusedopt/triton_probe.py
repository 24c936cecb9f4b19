"""Whether Triton can compile for a GPU, asked before anything depends on the answer.

Triton needs more than itself: a C compiler with Python's headers, a folder for its cache, an assembler that knows the
GPU. An image made for running programs often lacks the first.
"""

from __future__ import annotations

import functools

import torch
import triton

from .backends import in_short
from .upload import on


@triton.jit
def nothing():
    pass


@functools.cache
def problem(device: torch.device) -> str | None:
    """Why no kernel can be compiled for the device, or None."""
    try:
        from . import triton_backend  # noqa: F401 (a later Triton may lack what it imports)

        with on(device):
            # Not loaded: Triton 3.6 builds a launcher for that, for a quarter of a second.
            nothing.warmup(grid=(1,), enable_fp_fusion=False)
    except Exception as error:  # of the compiler, the assembler, the driver, the file system
        return f"Triton cannot compile kernels ({in_short(error)})"
    return None
