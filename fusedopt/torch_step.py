"""What is left to torch.optim's own step, and why."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from .backends import backend_of
from .hooks import warn
from .shards import PLAIN

FALLBACK_IS_FOR = {"cpu", "meta"}
"""Types of devices; on others torch.optim's own step is faster."""

DIFFERENTIABLE, SPARSE, COMPLEX = "differentiable=True", "a sparse gradient", "a complex parameter"
META = "a parameter on the meta device"

PLAIN_TENSORS = "make the parameters and gradients plain dense real tensors"
REMEDIES = {
    DIFFERENTIABLE: "leave differentiable out",
    SPARSE: "make the gradient dense (sparse=False of an embedding), or give the parameter an optimizer of its own",
    COMPLEX: "make it a real parameter, which the model looks at by torch.view_as_complex",
    META: "move the model to a device first (to_empty)",
}


class NotFusable(Exception):
    """Some parameter needs torch's own step; the message names it and says why."""

    complex_param: Tensor | None = None
    """That parameter, if all that speaks against it is that it is complex."""

    def __init__(self, reason: str, remedy: str = PLAIN_TENSORS):
        super().__init__(reason)
        self.remedy = remedy
        """What else can be done, where torch's own step is not possible."""

    def lasts(self, optimizer: Any) -> bool:
        """Whether this reason, found at an earlier step, is known to hold at this one, so that nothing has to be
        planned."""
        p = self.complex_param
        if p is None or p.grad is None or not p.is_complex():
            return False
        return any(p is other for group in optimizer.param_groups for other in group["params"])


def left_to_torch(optimizer: Any, devices: Iterable[torch.device]) -> NotFusable | None:
    """Why the whole step is torch's own: on a GPU without kernels, unless more is asked for than torch.optim can do.
    The fallback is made for CPUs; torch's calls for lists of tensors are faster there."""
    if optimizer.step_of_torch is None:
        return None
    if own := own_init_group(type(optimizer)):
        return NotFusable(f"{own.__name__}'s own _init_group, which torch's step alone calls", "take that out")
    if optimizer._settings.active():
        return None
    for device in devices:
        choice = backend_of(optimizer, device)
        if choice.name == "torch" and device.type not in FALLBACK_IS_FOR:
            if optimizer.backend is None and device not in optimizer._kernel_failures:
                _say_once(f"{choice.reason}: torch.optim's own step runs on {device}")
            return NotFusable(f"parameters on {device}, where {choice.reason}")
    return None


def base_in_torch(cls: type) -> type:
    """The nearest class of torch's among its bases."""
    return next(c for c in cls.__mro__ if c.__module__.startswith("torch."))


def unhooked(step: Callable) -> Callable:
    """The function inside the wrapper that runs hooks, which torch puts around it with the first instance."""
    return step.__wrapped__ if getattr(step, "hooked", False) else step


@functools.cache
def own_init_group(cls: type) -> type | None:
    """The class of a user's, if there is one, that prepares states in its own way."""
    found = next((c for c in cls.__mro__ if "_init_group" in vars(c)), None)
    return None if found is None or found.__module__.startswith("torch.") else found


_say_once = functools.cache(warn)


def reason_against(p: Tensor, g: Tensor, group: dict[str, Any]) -> str | None:
    """Why no fused step can update this parameter, or None."""
    if group.get("differentiable", False):
        return DIFFERENTIABLE
    if g.layout is not torch.strided:
        return SPARSE
    if p.is_complex():
        return COMPLEX
    if p.is_meta:
        return META
    if not p.is_floating_point() or not g.is_floating_point():
        return f"a parameter of dtype {p.dtype}"
    if type(p) not in PLAIN or type(g) is not Tensor:
        return f"a tensor subclass ({type(p).__name__} with a gradient of {type(g).__name__})"
    return None


class TorchStep:
    """The part of an optimizer that calls the step of the torch.optim class behind it."""

    def _torch_step(self, reason: NotFusable) -> None:
        """torch's own step, for what no fused step can do."""
        active = self._settings.active()
        if active:
            raise RuntimeError(
                f"{', '.join(active)} cannot be combined with {reason}; leave the setting out, or {reason.remedy}"
            ) from None
        step = self.step_of_torch
        if step is None:
            raise RuntimeError(
                f"{type(self).__name__} cannot be combined with {reason}: torch.optim has no step to leave it to; "
                f"{reason.remedy}"
            ) from None
        self._engine.left = reason
        scaling = self._engine.scaling
        if scaling is not None:
            if scaling.found_inf is None:
                scaling.found_inf = scaling.unscale()
            if scaling.found_inf.item():
                self._engine.skips.count += 1
                return
        step()

    @property
    def step_of_torch(self) -> Callable[[], Any] | None:
        """torch's own step, if torch.optim has this class."""
        step = super().step.__func__
        if step is torch.optim.Optimizer.step:
            return None
        # Not the hooked one, or every hook would run twice.
        return functools.partial(unhooked(step), self)
