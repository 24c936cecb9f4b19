"""RMSprop.

    v <- alpha v + (1 - alpha) g^2        u = g / (sqrt(v) + eps)        p <- p - lr u

    centered:   a <- alpha a + (1 - alpha) g        u = g / (sqrt(v - a^2) + eps)
    momentum:   b <- mu b + u                       p <- p - lr b

    eps_inside_sqrt:    u = g / sqrt(v + eps), and g / sqrt(v - a^2 + eps)

``weight_decay * p`` is added to g before the rule. With ``eps=0`` a parameter whose gradient was always zero stays
put, where torch makes it NaN.

Sources: Tieleman and Hinton, Coursera lecture 6.5 (2012); centered: Graves, arXiv 1308.0850; defaults
and state of torch.optim 2.13.
"""

from __future__ import annotations

from functools import partial

import torch

from .blocks import blocks, is_plain, scratch
from .normalized import KEEP
from .optimizer import FusedOptimizer
from .rule import FOREVER, Rule, divisible, root_of_sum, root_plus_eps
from .settings import EpsSettings


def rmsprop(g, state, h, denominator=root_plus_eps):
    return g / denominator(mean_square(g, *state, h), h[1])


def rmsprop_centered(g, state, h, denominator=root_plus_eps):
    return g / denominator(variance(g, *state, h), h[1])


def rmsprop_momentum(g, state, h, denominator=root_plus_eps):
    v, b = state
    return b.mul_(h[2]).addcdiv_(g, denominator(mean_square(g, v, h), h[1]))


def rmsprop_centered_momentum(g, state, h, denominator=root_plus_eps):
    v, b, a = state
    return b.mul_(h[2]).addcdiv_(g, denominator(variance(g, v, a, h), h[1]))


def mean_square(g, v, h):
    weight, eps, mu = h
    return v.mul_(1 - weight).addcmul_(g, g, value=weight)


def variance(g, v, a, h):
    weight, eps, mu = h
    a.lerp_(g, weight)
    return torch.addcmul(mean_square(g, v, h), a, a, value=-1)


# torch has no fused RMSprop, but its fused Adam and AdamW do the work, where they are told to. Their square root
# and division take a third of the time of torch's separate calls.


def fused(params, grads, states, t, group, scale):
    """Adam with beta1 = 0: its first moment is the gradient itself, and may share its memory, since the kernel
    writes back what it read (but for the sign of a zero, and NaN for inf), or what clipping made of it."""
    lr, alpha = float(group["lr"]), float(group["alpha"])
    if is_plain(group, None):
        return _adam(params, grads, grads, states[0], lr=lr, beta2=alpha, group=group, scale=scale)
    for p, g, v in blocks(group, scale, params, grads, *states):
        _adam([p], [g], [g], [v], lr=lr, beta2=alpha, group=group)


def fused_momentum(params, grads, states, t, group, scale):
    """b is AdamW's parameter: with lr = -1 and decay mu - 1 it becomes mu b + u."""
    for p, g, v, b in blocks(group, scale, params, grads, *states):
        _adamw_on_buffer([b], [g], [g], [v], beta2=float(group["alpha"]), group=group)
        p.sub_(b, alpha=float(group["lr"]))


def fused_centered(params, grads, states, t, group, scale):
    lr = float(group["lr"])
    for p, g, v, a in blocks(group, scale, params, grads, *states):
        centered = _variance(g, v, a, group, scratch("variance", p))
        _adam([p], [scratch("zeros", p)], [_writable(g)], [centered], lr=lr, beta1=KEEP, beta2=KEEP, group=group)


def fused_centered_momentum(params, grads, states, t, group, scale):
    for p, g, v, b, a in blocks(group, scale, params, grads, *states):
        centered = _variance(g, v, a, group, scratch("variance", p))
        _adamw_on_buffer([b], [scratch("zeros", p)], [_writable(g)], [centered], beta1=KEEP, beta2=KEEP, group=group)
        p.sub_(b, alpha=float(group["lr"]))


def _variance(g, v, a, group, out):
    """Adam moves both averages in one pass. What it makes of its parameter, without a learning rate, is overwritten."""
    alpha = float(group["alpha"])
    _adam([out], [g], [a], [v], lr=0.0, beta1=alpha, beta2=alpha, group=group)
    return torch.addcmul(v, a, a, value=-1, out=out)


def _writable(g):
    """The gradient, or a copy where KEEP is not 1: it takes half an ulp from what it should leave alone."""
    return g.clone() if g.dtype == torch.float64 else g


def _adam(params, grads, m, v, *, lr, beta1=0.0, beta2, group, scale=None):
    torch._fused_adam_(
        params, grads, m, v, [], [FOREVER] * len(params), lr=lr, beta1=beta1, beta2=beta2,
        weight_decay=0.0, eps=divisible(group["eps"]), amsgrad=False, maximize=False, grad_scale=scale,
    )  # fmt: skip


def _adamw_on_buffer(b, grads, m, v, *, beta1=0.0, beta2, group):
    torch._fused_adamw_(
        b, grads, m, v, [], [FOREVER], lr=-1.0, beta1=beta1, beta2=beta2,
        weight_decay=float(group["momentum"]) - 1, eps=divisible(group["eps"]), amsgrad=False, maximize=False,
    )  # fmt: skip


DTYPES = frozenset((torch.float32, torch.float64))
SQUARES = ("square_avg",)
# A root of a difference of states: rounded ones could make it negative.
EXACT = ("square_avg", "grad_avg")
PLAIN = Rule("rmsprop", SQUARES, rmsprop, fused, DTYPES, squares=SQUARES)
MOMENTUM = Rule(
    "rmsprop_momentum", (*SQUARES, "momentum_buffer"), rmsprop_momentum, fused_momentum, DTYPES, squares=SQUARES
)
CENTERED = Rule("rmsprop_centered", EXACT, rmsprop_centered, fused_centered, DTYPES, exact=EXACT)
BOTH = Rule(
    "rmsprop_centered_momentum",
    ("square_avg", "momentum_buffer", "grad_avg"),
    rmsprop_centered_momentum,
    fused_centered_momentum,
    DTYPES,
    exact=EXACT,
)


# An average that never changes has no beta below 1.
WITHOUT_FUSED = {rule.name: rule._replace(fused=None) for rule in (PLAIN, MOMENTUM, CENTERED, BOTH)}

EPS_INSIDE = {
    rule.name: rule._replace(name=f"{rule.name}_eps_inside", twin=partial(rule.twin, denominator=root_of_sum))
    for rule in WITHOUT_FUSED.values()
}


class RMSprop(FusedOptimizer, torch.optim.RMSprop):
    """RMSprop, with torch.optim.RMSprop's arguments and defaults."""

    settings_class = EpsSettings

    def rule(self, group):
        if group["momentum"] > 0:
            rule = BOTH if group["centered"] else MOMENTUM
        else:
            rule = CENTERED if group["centered"] else PLAIN
        if self._settings.eps_inside_sqrt and group["eps"] != 0:
            return EPS_INSIDE[rule.name]
        return rule if group["alpha"] < 1 else WITHOUT_FUSED[rule.name]

    def hyper(self, group, t):
        return 1 - float(group["alpha"]), divisible(group["eps"]), group["momentum"]
