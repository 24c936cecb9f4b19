"""torch's fused Adam at work for its relatives, for which torch has no kernel.

Most of their time goes into dividing by the root of an average of squares. The fused kernel does that in a third of the
time of separate calls, and its arguments can be chosen so that it changes nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .rule import FOREVER, SMALLEST, root_plus_eps

KEEP = 1 - 2.0**-53
"""A beta with which an average stays what it was: 1 in float32, and at most an ulp of the gradient is added."""

LONG_AGO = torch.tensor(-(2.0**53), dtype=torch.float32, device="cpu")
"""A step count at which the bias correction of a beta above 1 is 1, and that of KEEP what ``KEPT`` is."""

KEPT = 1 - KEEP ** LONG_AGO.item()


def step_uncorrected(
    params: Sequence[Tensor], grads: Sequence[Tensor], moments: Sequence[Tensor], squares: Sequence[Tensor], *,
    lr: float, beta1: float, beta2: float, eps: float, weight_decay: float = 0.0, decoupled: bool = False,
    maximize: bool = False, scale: Tensor | None = None,
) -> None:  # fmt: skip
    """Adam's step, or AdamW's, without bias corrections: p <- p - lr m / (sqrt(v) + eps) after both averages moved."""
    kernel = torch._fused_adamw_ if decoupled else torch._fused_adam_
    kernel(
        params, grads, moments, squares, [], [FOREVER] * len(params), lr=lr, beta1=beta1, beta2=beta2,
        weight_decay=weight_decay, eps=max(eps, SMALLEST), amsgrad=False, maximize=maximize, grad_scale=scale,
    )  # fmt: skip


def normalized(numerator: Tensor, g: Tensor, v: Tensor, weight: float, correction: float, eps: float) -> Tensor:
    """v <- (1 - weight) v + weight g^2, in place; returns numerator / (correction sqrt(v) + eps), and may use up
    the numerator. ``weight`` is above 0."""
    if all(x.is_cpu and x.dim() == 1 and x.is_contiguous() for x in (numerator, g, v)):
        quotient = torch.zeros_like(v)
        step_normalized(quotient, numerator, g, v, weight, correction, eps, -1.0)
        return quotient
    v.mul_(1 - weight).addcmul_(g, g, value=weight)
    return numerator.div_(root_plus_eps(v, eps, correction))


def step_normalized(
    p: Tensor, numerator: Tensor, g: Tensor, v: Tensor, weight: float, correction: float, eps: float,
    lr: float, decay: float = 0.0,
) -> None:  # fmt: skip
    """v moves on in the same way, and p <- p - lr (numerator / (correction sqrt(v) + eps) + decay p): torch's fused
    AdamW, whose first moment the numerator is. A ``weight`` of -1 makes v what 2 v - g^2 is."""
    step, kept = (FOREVER, 1.0) if weight > 0 else (LONG_AGO, KEPT)
    torch._fused_adamw_(
        [p], [g], [numerator], [v], [], [step], lr=kept * lr / correction, beta1=KEEP, beta2=1 - weight,
        weight_decay=decay * correction / kept, eps=max(eps / correction, SMALLEST), amsgrad=False, maximize=False,
    )  # fmt: skip
