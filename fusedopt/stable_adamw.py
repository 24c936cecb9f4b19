"""StableAdamW: AdamW whose step is limited where v lags behind the gradient.

    beta1' = beta1 (1 - beta1^(t - 1)) / (1 - beta1^t), beta2' likewise: the averages need no correction then
    m <- beta1' m + (1 - beta1') g
    v <- beta2' v + (1 - beta2') g^2
    RMS = sqrt(mean(g^2 / max(v, eps^2))), the mean over each parameter
    u   = (m / (sqrt(v) + eps) + weight_decay p) / max(1, RMS)          p <- p - lr u

Sources: Wortsman et al., arXiv 2304.13013, algorithm 2; state and default betas and eps as in torch-optimi's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .adam import ADAM, fused_direction
from .arguments import check_betas, check_nonnegative
from .blocks import blocks, parted_decay
from .capture import CapturableSettings
from .means import ahead_of, mean
from .optimizer import FusedOptimizer
from .rule import SMALLEST, WIDE, Stage, divisible


class StableAdamW(FusedOptimizer):
    """StableAdamW, with AdamW's arguments.

    Args:
        params: parameters, named parameters, or groups of them.
        lr (float or 1-element tensor): the learning rate.
        betas: how much of the averages m and v is kept at each step.
        eps (float): added to the root of v, and its lower bound in RMS.
        weight_decay (float): decoupled, and limited with the rest of u.
        maximize (bool): ascend instead of descend.
    """

    settings_class = CapturableSettings
    capturable: bool

    def __init__(
        self, params: ParamsT, lr: float | Tensor = 1e-3, betas: tuple[float, float] = (0.9, 0.99), eps: float = 1e-6,
        weight_decay: float = 1e-2, *, maximize: bool = False, **settings: Any,
    ) -> None:  # fmt: skip
        check_nonnegative(lr=lr, eps=eps, weight_decay=weight_decay)
        check_betas(betas, 2)
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "maximize": maximize}
        super().__init__(params, defaults, **settings)

    def rule(self, group):
        return RULE

    def hyper(self, group, t):
        return hyper(group, t)

    def decoupled(self, group):
        return True

    def update(self, group, t):
        update = super().update(group, t)
        limit = Stage("limit_rms", (smallest_square(group),), None, terms=("excess",))
        return update._replace(on_update=(*update.on_update, limit))


def fused(params, grads, states, t, group, scale, rates, sizes):
    """torch's fused Adam makes u out of zeros, for one tensor at a time."""
    h, (decay, before) = hyper(group, t), parted_decay(group)

    def step(p, g, m, v, lr, lengths):
        u, excess = torch.zeros_like(p), torch.zeros_like(p)
        for p_block, g_block, m_block, v_block, u_block, x in blocks(before, scale, [p], [g], [m], [v], [u], [excess]):
            fused_direction(p_block, g_block, m_block, v_block, u_block, h, decay)
            ahead_of(v_block, g_block, smallest_square(group), out=x)
        p.addcdiv_(u, mean(excess, lengths).sqrt_().clamp_(min=1.0), value=-lr)

    for tensors in zip(params, grads, *states, rates, sizes):
        step(*tensors)


def hyper(group, t):
    beta1, beta2 = map(float, group["betas"])
    return (1 - beta1) / (1 - beta1**t), (1 - beta2) / (1 - beta2**t), divisible(group["eps"]), 1.0, 1.0


def smallest_square(group):
    return max(float(group["eps"]) ** 2, SMALLEST)


RULE = ADAM._replace(fused=fused, fused_dtypes=WIDE, takes_rates=True, takes_sizes=True, list_threads=0)
