"""Launches of compiled kernels.

Triton's binder looks at every argument of every launch, to find out which compiled kernel serves them: ten
microseconds. What a kernel was compiled for is known here, so its handle is kept and called directly.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import torch
from triton import knobs
from triton.runtime import driver

from . import triton_interpreter
from .backends import KernelFailed, interpreting
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
        """Where launches of what is not known yet are left as calls of ``compiled``, instead of being made."""

    def compiled(self, kernel: Any, *args: Any, load: bool = True, **constants: Any) -> Any:
        """The kernel that these arguments need, loaded unless that shall wait, so that its registers are known, without
        launching it. KernelFailed if it cannot be had."""
        with on(self.device), self._first_time(kernel, constants):
            compiled = kernel.warmup(*args, grid=(1,), **constants)
            if load:
                # Not ``run``, which of a kernel that could not be loaded says so only once.
                compiled._init_handles()
        return compiled

    @contextlib.contextmanager
    def _first_time(self, kernel: Any, constants: dict[str, Any]) -> Iterator[None]:
        """Whatever the compiler, the assembler, the driver or another Triton than we know has against it."""
        try:
            yield
        except (KernelFailed, torch.OutOfMemoryError):
            raise
        except Exception as error:
            names = [function.__name__ for function in (kernel, constants.get("RULE")) if function is not None]
            raise KernelFailed(" of ".join(names), self.device, error) from error

    def __call__(self, kernel: Any, variant: Hashable, grid: int, *args: Any, **constants: Any) -> None:
        """Launch ``kernel[(grid,)](*args, **constants)`` on the current stream of the device.

        Args:
            kernel: a jit function whose run-time arguments come first.
            variant: whatever differs between launches of this kernel from here and matters to the compiler: constants,
                which arguments are None, which pointers are multiples of 16.
            grid: the number of programs.
            args: the run-time arguments. Pointers may be tensors or addresses.
            constants: compile-time arguments and launch options.

        Raises:
            KernelFailed: if what was never launched from here cannot be.
        """
        known = self.known.get((id(kernel), variant))
        if known is None and self.foreseen is not None:
            self.foreseen.append(functools.partial(self.compiled, kernel, *args, **constants))
            return
        if known is None and DIRECT and capturing(self.device):
            raise RuntimeError(
                "this step would compile a kernel while a CUDA graph is captured: take a few steps with the same "
                "settings and the same kinds of gradients before capturing"
            )
        if known is None:
            with self._first_time(kernel, constants):
                known = self._handle(kernel, args, constants)
                self._launch(known, kernel, grid, args, constants)
            if known is not None:
                self.known[id(kernel), variant] = known
        else:
            self._launch(known, kernel, grid, args, constants)

    def _handle(self, kernel: Any, args: tuple, constants: dict[str, Any]) -> tuple | None:
        """The compiled kernel, what launches it, and the constants that it is launched with. None in the interpreter,
        which compiles nothing."""
        if interpreting() or not DIRECT:
            return None
        compiled = self.compiled(kernel, *args, **constants)
        return compiled, compiled.run, tuple(constants[name] for name in kernel.arg_names[len(args) :])

    def _launch(self, known: tuple | None, kernel: Any, grid: int, args: tuple, constants: dict[str, Any]) -> None:
        with on(self.device):
            # Profilers want to hear of launches.
            if known is None or knobs.runtime.launch_enter_hook.calls:
                kernel[(grid,)](*args, **constants)
                return
            compiled, run, values = known
            stream = driver.active.get_current_stream(self.device.index)
            run(grid, 1, 1, stream, compiled.function, compiled.packed_metadata, None, None, None, *args, *values)
