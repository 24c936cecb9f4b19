"""Lion.

    u = sign(beta1 m + (1 - beta1) g)        m <- beta2 m + (1 - beta2) g        p <- p - lr (u + weight_decay p)

Its step is lr in every element: take a lr 3 to 10 times smaller than AdamW's, and a larger decay.

Sources: Chen et al., arXiv 2302.06675; state and defaults as in lion-pytorch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .arguments import check_betas, check_nonnegative
from .blocks import blocks, parted_decay, scratch
from .capture import CapturableSettings
from .optimizer import FusedOptimizer
from .rule import Rule


def lion(g, state, h, out=None):
    m = state[0]
    weight1, weight2 = h
    u = torch.lerp(m, g, weight1, out=out).sign_()
    m.lerp_(g, weight2)
    return u


def fused(params, grads, states, t, group, scale, rates):
    """The direction in memory that is kept; torch's fused SGD goes there."""
    h = hyper(group)
    decay, before = parted_decay(group)
    for p, g, m, lr in blocks(before, scale, params, grads, *states, rates=rates):
        u = lion(g, [m], h, scratch("direction", p))
        torch._fused_sgd_(
            [p], [u], [], weight_decay=decay, momentum=0.0, lr=lr, dampening=0.0, nesterov=False, maximize=False,
            is_first_step=False,
        )  # fmt: skip


def hyper(group):
    beta1, beta2 = map(float, group["betas"])
    return 1 - beta1, 1 - beta2


LION = Rule("lion", ("exp_avg",), lion, fused, takes_rates=True)


class Lion(FusedOptimizer):
    """Lion.

    Args:
        params: parameters, named parameters, or groups of them.
        lr (float or 1-element tensor): the learning rate, and the size of a step in every element.
        betas: how much of m is in the direction, and how much of it is kept.
        weight_decay (float): decoupled.
        maximize (bool): ascend instead of descend.
    """

    settings_class = CapturableSettings
    capturable: bool

    def __init__(
        self, params: ParamsT, lr: float | Tensor = 1e-4, betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0, *, maximize: bool = False, **settings: Any,
    ) -> None:  # fmt: skip
        check_nonnegative(lr=lr, weight_decay=weight_decay)
        check_betas(betas, 2)
        defaults = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "maximize": maximize}
        super().__init__(params, defaults, **settings)

    def rule(self, group):
        return LION

    def hyper(self, group, t):
        return hyper(group)

    def decoupled(self, group):
        return True
