"""Adamax: Adam with the largest recent gradient in place of the root of the mean square.

    m <- beta1 m + (1 - beta1) g        u = m / n
    n <- max(beta2 n, |g| + eps)        p <- p - lr / (1 - beta1^t) u

``weight_decay * p`` is added to g before the rule.

Sources: Kingma and Ba, arXiv 1412.6980, section 7.1; defaults, state and the place of eps of torch.optim 2.13.
"""

from __future__ import annotations

import torch

from .blocks import SECOND_CACHE, blocks, scratch
from .columns import number
from .optimizer import FusedOptimizer
from .rule import Rule, divisible


def adamax(g, state, h):
    m, n = state
    move(g, m, n, h)
    return m / n


def move(g, m, n, h, bound=None):
    weight1, beta2, eps = h
    m.lerp_(g, weight1)
    torch.maximum(n.mul_(beta2), torch.abs(g, out=bound).add_(eps), out=n)


def fused(params, grads, states, t, group, scale):
    """The quotient on the way into the parameter: torch has no fused Adamax, but addcdiv."""
    h, size = hyper(group), step_size(group, t)
    for p, g, m, n in blocks(group, scale, params, grads, *states, sizes=SECOND_CACHE):
        move(g, m, n, h, scratch("bound", p))
        p.addcdiv_(m, n, value=-size)


def hyper(group):
    beta1, beta2 = map(float, group["betas"])
    return 1 - beta1, beta2, divisible(group["eps"])


def step_size(group, t):
    return number(group["lr"]) / (1 - float(group["betas"][0]) ** t)


ADAMAX = Rule("adamax", ("exp_avg", "exp_inf"), adamax, fused, squares=("exp_inf",))


class Adamax(FusedOptimizer, torch.optim.Adamax):
    """Adamax, with torch.optim.Adamax's arguments and defaults."""

    def rule(self, group):
        return ADAMAX

    def hyper(self, group, t):
        return hyper(group)

    def lr(self, group, t):
        return step_size(group, t)
