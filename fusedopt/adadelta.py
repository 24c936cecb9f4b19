"""Adadelta.

    v <- rho v + (1 - rho) g^2        u = sqrt((d + eps) / (v + eps)) g
    d <- rho d + (1 - rho) u^2        p <- p - lr u

``weight_decay * p`` is added to g before the rule.

Sources: Zeiler, arXiv 1212.5701; lr, defaults and state of torch.optim 2.13.
"""

from __future__ import annotations

import torch

from .optimizer import FusedOptimizer
from .rule import Rule, divisible


def adadelta(g, state, h):
    v, d = state
    weight, eps = h
    v.mul_(1 - weight).addcmul_(g, g, value=weight)
    u = d.add(eps).div_(v.add(eps)).sqrt_().mul_(g)
    d.mul_(1 - weight).addcmul_(u, u, value=weight)
    return u


STATES = ("square_avg", "acc_delta")
ADADELTA = Rule(
    "adadelta",
    STATES,
    adadelta,
    squares=STATES,
    # Where v is a code too small, d grows by a part of itself at each step, and with it the update.
    uncoded=("square_avg",),
)


class Adadelta(FusedOptimizer, torch.optim.Adadelta):
    """Adadelta, with torch.optim.Adadelta's arguments and defaults."""

    def rule(self, group):
        return ADADELTA

    def hyper(self, group, t):
        return 1 - float(group["rho"]), divisible(group["eps"])
