"""Adadelta.

    v <- rho v + (1 - rho) g^2        u = sqrt((d + eps) / (v + eps)) g
    d <- rho d + (1 - rho) u^2        p <- p - lr u

``weight_decay * p`` is added to g before the rule.

Sources: Zeiler, arXiv 1212.5701; lr, defaults and state of torch.optim 2.13.
"""

from __future__ import annotations

import torch

from .blocks import SECOND_CACHE, blocks, scratch
from .columns import number
from .optimizer import FusedOptimizer
from .rule import Rule, divisible


def adadelta(g, state, h):
    return direction(g, *state, h)


def direction(g, v, d, h, update=None, divisor=None):
    """The averages move on; ``update`` and ``divisor`` are memory to work in."""
    weight, eps = h
    v.mul_(1 - weight).addcmul_(g, g, value=weight)
    u = torch.add(d, eps, out=update).div_(torch.add(v, eps, out=divisor)).sqrt_().mul_(g)
    d.mul_(1 - weight).addcmul_(u, u, value=weight)
    return u


def fused(params, grads, states, t, group, scale):
    """The same in memory that is kept: torch has no fused Adadelta."""
    h, lr = hyper(group), number(group["lr"])
    for p, g, v, d in blocks(group, scale, params, grads, *states, sizes=SECOND_CACHE):
        p.sub_(direction(g, v, d, h, scratch("update", p), scratch("divisor", p)), alpha=lr)


def hyper(group):
    return 1 - float(group["rho"]), divisible(group["eps"])


STATES = ("square_avg", "acc_delta")
ADADELTA = Rule(
    "adadelta",
    STATES,
    adadelta,
    fused,
    squares=STATES,
    # Where v is a code too small, d grows by a part of itself at each step, and with it the update.
    uncoded=("square_avg",),
)


class Adadelta(FusedOptimizer, torch.optim.Adadelta):
    """Adadelta, with torch.optim.Adadelta's arguments and defaults."""

    def rule(self, group):
        return ADADELTA

    def hyper(self, group, t):
        return hyper(group)
