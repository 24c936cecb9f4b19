"""Launches of compiled kernels.

Triton's binder looks at every argument of every launch, to find out which compiled kernel serves them: ten
microseconds. What a kernel was compiled for is known here, so its handle is kept and called directly.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from typing import Any

import torch
from triton import knobs
from triton.runtime import driver

from . import triton_interpreter
from .backends import interpreting
from .upload import capturing, on

if interpreting():
    triton_interpreter.repair()

DIRECT = True
"""Tests switch it off, to have the binder compare every launch with what was compiled."""


class Launches:
    """The kernels that were launched on one device."""

    def __init__(self, device: torch.device):
        self.device = device
        self.known: dict[tuple, tuple] = {}
        self.foreseen: list[Callable[[], Any]] | None = None
        """Where launches of what is not known yet are left as calls that compile it, instead of being made."""

    def compiled(self, kernel: Any, *args: Any, **constants: Any) -> Any:
        """The kernel that these arguments need, loaded, without launching it."""
        with on(self.device):
            compiled = kernel.warmup(*args, grid=(1,), **constants)
            compiled.run  # noqa: B018 (loads it, and so learns how many registers it takes)
        return compiled

    def __call__(self, kernel: Any, variant: Hashable, grid: int, *args: Any, **constants: Any) -> None:
        """Launch ``kernel[(grid,)](*args, **constants)`` on the current stream of the device.

        Args:
            kernel: a jit function whose run-time arguments come first.
            variant: whatever differs between launches of this kernel from here and matters to the compiler: constants,
                which arguments are None, which pointers are multiples of 16.
            grid: the number of programs.
            args: the run-time arguments. Pointers may be tensors or addresses.
            constants: compile-time arguments and launch options.
        """
        known = self.known.get((id(kernel), variant))
        if known is None and self.foreseen is not None:
            self.foreseen.append(functools.partial(kernel.warmup, *args, grid=(1,), **constants))
            return
        # Profilers want to hear of launches.
        if known is None and DIRECT and capturing(self.device):
            raise RuntimeError(
                "this step would compile a kernel while a CUDA graph is captured: take a few steps with the same "
                "settings and the same kinds of gradients before capturing"
            )
        if known is None or knobs.runtime.launch_enter_hook.calls:
            with on(self.device):
                compiled = kernel[(grid,)](*args, **constants)
            # The interpreter compiles nothing.
            if DIRECT and compiled is not None:
                values = tuple(constants[name] for name in kernel.arg_names[len(args) :])
                self.known[id(kernel), variant] = compiled, compiled.run, values
            return
        compiled, run, values = known
        with on(self.device):
            stream = driver.active.get_current_stream(self.device.index)
            run(grid, 1, 1, stream, compiled.function, compiled.packed_metadata, None, None, None, *args, *values)
