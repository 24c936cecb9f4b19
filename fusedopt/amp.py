"""Mixed precision without an extra pass over the gradients.

torch's GradScaler reads and writes every gradient once more before a step, to divide it by the loss scale and to see
whether it is finite. Here the step does both on its way: gradients are *scaled* when backward leaves them, and go
into the step like that, unless the user called ``unscale_`` to look at them, which makes torch's pass.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import OptState

from .clipping import Scaling
from .groups import params_of
from .optimizer import FusedOptimizer

NOTHING_CHECKED = "No inf checks were recorded for this optimizer."
"""torch's words, where no parameter has a gradient."""


class GradScaler(torch.amp.GradScaler):
    """torch.amp.GradScaler, with its arguments, defaults, scale history and ``state_dict``. Where ``step`` is given an
    optimizer of fusedopt whose gradients were not unscaled, the optimizer's own pass unscales and checks them.

    What differs then, as with torch's optimizers under ``fused=True``: float16 gradients are allowed; a step with a
    non-finite gradient runs the optimizer's step hooks, changes nothing else, and is counted in
    ``optimizer.skipped_steps``; on a GPU the host does not wait for the verdict. And ``p.grad`` may stay scaled:
    torch's fused kernels, which the CPU fallback calls, write it back unscaled, ours leave it alone. Other optimizers
    are stepped as by torch.

    Formula: g <- g / scale, unless some g is inf or NaN; then nothing changes, and ``update`` halves the scale.
    Shapes and dtypes: gradients of any shape, in float64, float32, bfloat16 or float16. Errors: torch's, see ``step``
    and ``unscale_``. Source: torch.amp.GradScaler of torch 2.13; Micikevicius et al., arXiv 1710.03740.
    """

    def step(self, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> Any:
        """``optimizer.step(*args, **kwargs)`` with unscaled gradients; no change if one of them is not finite.

        Raises:
            RuntimeError: for a closure, or a second call since ``update``, as in torch.
            AssertionError: as in torch, if nothing was scaled, or no parameter has a gradient.
        """
        if not self._enabled or not isinstance(optimizer, FusedOptimizer):
            return super().step(optimizer, *args, **kwargs)
        if optimizer._engine.released:
            raise RuntimeError(
                "backward has updated the parameters by gradients that were multiplied by the loss scale: gradient "
                "release cannot be combined with a GradScaler; use bfloat16, which needs none"
            )
        state = self._per_optimizer_states[id(optimizer)]
        if "closure" in kwargs or args or state["stage"] is OptState.STEPPED:
            return super().step(optimizer, *args, **kwargs)  # which says what is wrong
        scale, _ = self._check_scale_growth_tracker("step")
        scaled = state["stage"] is OptState.READY
        if scaled and not any(p.grad is not None for p in params_of(optimizer)):
            raise AssertionError(NOTHING_CHECKED)
        with self._in_charge(optimizer, scale) as scaling:
            result = optimizer.step(**kwargs)
        if scaled:
            # Nobody has looked where a step hook has dropped all gradients.
            found = torch.zeros_like(scale) if scaling.found_inf is None else scaling.found_inf
            state["found_inf_per_device"] = {found.device: found}
        state["stage"] = OptState.STEPPED
        return result

    def clip_grad_norm_(
        self,
        optimizer: torch.optim.Optimizer,
        max_norm: float,
        norm_type: float = 2.0,
        error_if_nonfinite: bool = False,
    ) -> Tensor:
        """What ``unscale_`` and then torch.nn.utils.clip_grad_norm_ do. With an optimizer of fusedopt both are left to
        its step, and the gradients stay scaled and unclipped. Returns the norm of the unscaled gradients."""
        arguments = max_norm, norm_type, error_if_nonfinite
        scaled = self._enabled and self._per_optimizer_states[id(optimizer)]["stage"] is OptState.READY
        if not isinstance(optimizer, FusedOptimizer):
            if scaled:
                self.unscale_(optimizer)
            params = params_of(optimizer)
            return torch.nn.utils.clip_grad_norm_(params, *arguments)
        if not scaled:
            return optimizer.clip_grad_norm_(*arguments)
        scale, _ = self._check_scale_growth_tracker("clip_grad_norm_")
        with self._in_charge(optimizer, scale):
            return optimizer.clip_grad_norm_(*arguments)

    def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
        """Divide the gradients by the loss scale now, in a pass of its own: for whoever looks at them before the step.

        Raises:
            RuntimeError: as in torch, and after ``clip_grad_norm_``, which has left the division to the step.
        """
        if isinstance(optimizer, FusedOptimizer) and optimizer._engine.will_unscale(optimizer):
            raise RuntimeError("unscale_() is being called after clip_grad_norm_(), which unscales in the step")
        super().unscale_(optimizer)

    @contextlib.contextmanager
    def _in_charge(self, optimizer: FusedOptimizer, scale: Tensor) -> Iterator[Scaling]:
        """Tell the optimizer what this scaler asks of what it does next."""

        def unscale() -> Tensor:
            self.unscale_(optimizer)
            return self._found_inf(optimizer)

        scaled = self._per_optimizer_states[id(optimizer)]["stage"] is OptState.READY
        scaling = Scaling(scale, None, unscale) if scaled else Scaling(None, self._found_inf(optimizer), unscale)
        optimizer._engine.scaling = scaling
        try:
            yield scaling
        finally:
            optimizer._engine.scaling = None

    def _found_inf(self, optimizer: torch.optim.Optimizer) -> Tensor:
        """Whether ``unscale_`` met a number that is not finite, on whatever device."""
        found = self._per_optimizer_states[id(optimizer)]["found_inf_per_device"].values()
        if not found:
            raise AssertionError(NOTHING_CHECKED)
        return torch.stack([x.to(self._scale.device, non_blocking=True) for x in found]).sum()
