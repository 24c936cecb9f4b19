"""Which backend runs where, and why."""

from __future__ import annotations

import functools
import os
from typing import Any, NamedTuple

import torch

from . import setting_checks
from .upload import capturing


class Backend(NamedTuple):
    """The answer of ``backend``, which raises the errors: ``name`` is "torch" or "triton", ``reason`` a sentence."""

    name: str
    reason: str

    def __str__(self) -> str:
        return self.name


class KernelFailed(RuntimeError):
    """A kernel of ours could not be compiled, loaded or launched for the first time, and so has done nothing. The
    message names it, and its ``__cause__`` is the error."""

    def __init__(self, kernel: str, device: torch.device, error: Exception):
        super().__init__(f"the kernel {kernel} failed ({in_short(error)})")
        self.device = device
        self.too_late = False
        """Whether the step had changed something before."""


def in_short(error: Exception) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"


@functools.cache
def triton_problem() -> str | None:
    """Why Triton cannot be used at all, or None."""
    try:
        import triton
    except ImportError as error:
        return f"Triton is not installed ({error})"
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if version < (3, 6):
        return f"Triton {triton.__version__} is older than 3.6"
    return None


def interpreting() -> bool:
    """Whether Triton's interpreter runs the kernels, so that they work on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def backend(device: str | torch.device | None = None, requested: str | None = None) -> Backend:
    """The backend for parameters on ``device`` (default: cuda where available, else cpu).

    Args:
        device: a device or its name.
        requested: the ``backend`` argument of an optimizer: "torch", "triton" or None for the best.

    Raises:
        ValueError: for another word.
        RuntimeError: if "triton" is requested and cannot run there; the message says why.
    """
    setting_checks.backend("backend", requested)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if requested == "torch":
        return Backend("torch", "requested")
    problem = triton_problem() or _device_problem(device, requested)
    if problem is None:
        return Backend("triton", "requested" if requested else "a GPU with Triton")
    if requested == "triton":
        raise RuntimeError(f"backend='triton' cannot run on {device}: {problem}; use backend=None or 'torch'")
    return Backend("torch", problem)


def backend_of(optimizer: Any, device: torch.device) -> Backend:
    """The same for the parameters of an optimizer, of whose kernels one may have failed there."""
    failure = optimizer._kernel_failures.get(device)
    if failure is not None and optimizer.backend is None:
        return Backend("torch", failure)
    return backend(device, optimizer.backend)


def _device_problem(device: torch.device, requested: str | None) -> str | None:
    if device.type == "cuda":
        if not torch.cuda.is_available():
            return "no GPU is available"
        if torch.version.cuda and torch.cuda.get_device_capability(device) < (7, 5):
            return f"{torch.cuda.get_device_name(device)} is older than compute capability 7.5"
        if interpreting() or capturing(device):
            return None  # nothing may be loaded during a capture
        from . import triton_probe

        return triton_probe.problem(device)
    if device.type == "cpu":
        if interpreting():
            return None if requested else "Triton's interpreter is for tests: ask for it with backend='triton'"
        return "Triton compiles for GPUs (on CPU tensors only its interpreter, TRITON_INTERPRET=1, can run)"
    return f"there are no kernels for {device.type} devices"
