"""Frameworks that clip by themselves, told that the step does it.

``transformers.Trainer`` computes the gradient norm at every step, by a pass of its own over all gradients, whether it
clips or not. With the mixin it takes the one that the optimizer's step has found::

    class FusedTrainer(FusedClipMixin, transformers.Trainer): ...

    args = TrainingArguments(..., max_grad_norm=0)  # the optimizer clips: AdamW(..., max_grad_norm=1.0)
"""

from __future__ import annotations

from typing import Any


class FusedClipMixin:
    """Before ``transformers.Trainer`` among the bases: no pass over the gradients outside the optimizer's step.

    The logged ``grad_norm`` is the latest step's before clipping, hence one step old: the Trainer asks before it steps.
    """

    def _clip_grad_norm(self, model: Any) -> Any:
        raise RuntimeError(
            f"both would clip: TrainingArguments(max_grad_norm={self.args.max_grad_norm}) and the optimizer; give "
            "TrainingArguments(max_grad_norm=0)"
        )

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        # accelerate's wrapper has no attributes of the optimizer's.
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        return optimizer.grad_norm
