"""Mixed precision without an extra pass over the gradients.

torch's GradScaler reads and writes every gradient once more before a step, to divide it by the loss scale and to see
whether it is finite. Here the step does both on its way: gradients are *scaled* when backward leaves them, and go
into the step like that, unless the user called ``unscale_`` to look at them, which makes torch's pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import OptState

from .clipping import Scaling
from .optimizer import FusedOptimizer

NOTHING_CHECKED = "No inf checks were recorded for this optimizer."
"""torch's words, where no parameter has a gradient."""


class GradScaler(torch.amp.GradScaler):
    """torch.amp.GradScaler, with its arguments, defaults, scale history and ``state_dict``. Where ``step`` is given an
    optimizer of fusedopt whose gradients were not unscaled, the optimizer's own pass unscales and checks them.

    What differs then, all of it as with torch's optimizers under ``fused=True``: ``p.grad`` stays scaled; float16
    gradients are allowed; a step with a non-finite gradient runs the optimizer's step hooks, changes nothing else, and
    is counted in ``optimizer.skipped_steps``; on a GPU the host does not wait for the verdict. Other optimizers are
    stepped as by torch.
    """

    def step(self, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> Any:
        """``optimizer.step(*args, **kwargs)`` with unscaled gradients; no change if one of them is not finite.

        Raises:
            RuntimeError: for a closure, or a second call since ``update``, as in torch.
            AssertionError: as in torch, if nothing was scaled, or no parameter has a gradient.
        """
        if not self._enabled or not isinstance(optimizer, FusedOptimizer):
            return super().step(optimizer, *args, **kwargs)
        state = self._per_optimizer_states[id(optimizer)]
        if "closure" in kwargs or args or state["stage"] is OptState.STEPPED:
            return super().step(optimizer, *args, **kwargs)  # which says what is wrong
        scale, _ = self._check_scale_growth_tracker("step")
        scaled = state["stage"] is OptState.READY
        if scaled and not any(p.grad is not None for group in optimizer.param_groups for p in group["params"]):
            raise AssertionError(NOTHING_CHECKED)

        def unscale() -> Tensor:
            self.unscale_(optimizer)
            return self._found_inf(optimizer)

        scaling = Scaling(scale, None, unscale) if scaled else Scaling(None, self._found_inf(optimizer), unscale)
        optimizer._engine.scaling = scaling
        try:
            result = optimizer.step(**kwargs)
        finally:
            optimizer._engine.scaling = None
        if scaled:
            state["found_inf_per_device"] = {scaling.found_inf.device: scaling.found_inf}
        state["stage"] = OptState.STEPPED
        return result

    def _found_inf(self, optimizer: torch.optim.Optimizer) -> Tensor:
        """Whether ``unscale_`` met a number that is not finite, on whatever device."""
        found = self._per_optimizer_states[id(optimizer)]["found_inf_per_device"].values()
        if not found:
            raise AssertionError(NOTHING_CHECKED)
        return torch.stack([x.to(self._scale.device, non_blocking=True) for x in found]).sum()
