"""What torch puts around an optimizer's ``step``, where it is needed; and warnings that look through it."""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
from torch.autograd import _profiler_enabled as is_profiling
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

BETWEEN = {"fusedopt", "torch", "contextlib"}
"""Packages whose frames stand between a warning and the line that called ``step``: how many there are depends on hooks,
schedulers and profilers."""


def warn(message: str) -> None:
    """Warn, with the user's line that called ``step``."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in BETWEEN:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)


def profile_hook_step(func: Callable[..., Any]) -> Callable[..., Any]:
    """What torch puts around ``step``, its name in profiles and hooks, where somebody profiles or there are hooks:
    it costs microseconds. Opaque to torch.compile: one graph break."""
    hooked = torch.optim.Optimizer.profile_hook_step(func)
    opaque = torch._disable_dynamo(hooked)

    @functools.wraps(func)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return opaque(*args, **kwargs)
        self = args[0]
        if (
            is_profiling()
            or self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks
            or _global_optimizer_pre_hooks
            or _global_optimizer_post_hooks
        ):
            return hooked(*args, **kwargs)
        result = func(*args, **kwargs)
        self._optimizer_step_code()
        if self._optimizer_step_post_hooks or _global_optimizer_post_hooks:  # that the closure has registered
            for hook in chain(self._optimizer_step_post_hooks.values(), _global_optimizer_post_hooks.values()):
                hook(self, args, kwargs)
        return result

    return wrapper
