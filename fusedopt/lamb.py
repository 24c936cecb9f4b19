"""LAMB: AdamW whose step is in proportion to each parameter's norm.

    m, v, m_hat, v_hat as Adam's
    u = m_hat / (sqrt(v_hat) + eps) + weight_decay p
    p <- p - lr |p| / |u| u             the norms over each parameter; p - lr u where one of them is zero

The norm of u is that before ``cautious``. Groups without decay, in which biases and the scales of normalizations are
put, take AdamW's step unless ``always_adapt``, as in Apex and timm.

Sources: You et al., arXiv 1904.00962, algorithm 2, with phi(x) = x; defaults of Apex's FusedLAMB.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .adam import ADAM, fused_direction, hyper
from .arguments import check_betas, check_nonnegative
from .blocks import blocks, parted_decay
from .capture import CapturableSettings
from .means import mean_of_squares, trust_ratio
from .optimizer import FusedOptimizer
from .rule import WIDE, Stage


class LAMB(FusedOptimizer):
    """LAMB, with AdamW's arguments and one of its own.

    Args:
        params: parameters, named parameters, or groups of them.
        lr (float or 1-element tensor): the learning rate, as a part of each parameter's norm.
        betas: how much of the averages m and v is kept at each step.
        eps (float): added to the root of v_hat.
        weight_decay (float): decoupled, and part of the u whose norm is taken.
        always_adapt (bool): scale the step in groups without decay too (Apex's ``use_nvlamb``).
        maximize (bool): ascend instead of descend.
    """

    settings_class = CapturableSettings
    capturable: bool

    def __init__(
        self, params: ParamsT, lr: float | Tensor = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-6,
        weight_decay: float = 1e-2, always_adapt: bool = False, *, maximize: bool = False, **settings: Any,
    ) -> None:  # fmt: skip
        check_nonnegative(lr=lr, eps=eps, weight_decay=weight_decay)
        check_betas(betas, 2)
        defaults = {
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "always_adapt": always_adapt,
            "maximize": maximize,
        }  # fmt: skip
        super().__init__(params, defaults, **settings)

    def rule(self, group):
        return RULE

    def hyper(self, group, t):
        return hyper(group, t)

    def decoupled(self, group):
        return True

    def update(self, group, t):
        update = super().update(group, t)
        weight = float(group["weight_decay"])
        adapts = float(weight != 0 or bool(group["always_adapt"]))
        trust = Stage("trust", (weight, adapts), (weight, 0.0), terms=("square_of_parameter", "square_of_step"))
        return update._replace(on_update=(*update.on_update, trust))


def fused(params, grads, states, t, group, scale, rates, sizes):
    """torch's fused Adam makes u out of zeros, for one tensor at a time."""
    h, (decay, before) = hyper(group, t), parted_decay(group)

    def step(p, g, m, v, lr, lengths):
        u = torch.zeros_like(p)
        for block in blocks(before, scale, [p], [g], [m], [v], [u]):
            fused_direction(*block, h, decay)
        if decay != 0 or group["always_adapt"]:
            p.addcmul_(u, trust_ratio(mean_of_squares(p, lengths), mean_of_squares(u, lengths)), value=-lr)
        else:
            p.sub_(u, alpha=lr)

    for tensors in zip(params, grads, *states, rates, sizes):
        step(*tensors)


RULE = ADAM._replace(fused=fused, fused_dtypes=WIDE, takes_rates=True, takes_sizes=True, list_threads=0)
