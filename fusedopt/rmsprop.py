"""RMSprop.

    v <- alpha v + (1 - alpha) g^2        u = g / (sqrt(v) + eps)        p <- p - lr u

    centered:   a <- alpha a + (1 - alpha) g        u = g / (sqrt(v - a^2) + eps)
    momentum:   b <- mu b + u                       p <- p - lr b

``weight_decay * p`` is added to g before the rule. With ``eps=0`` a parameter whose gradient was
always zero divides 0 by 0, as in torch.

Sources: Tieleman and Hinton, Coursera lecture 6.5 (2012); centered: Graves, arXiv 1308.0850; defaults
and state of torch.optim 2.10 to 2.13.
"""

from __future__ import annotations

import torch

from .optimizer import FusedOptimizer
from .rule import Rule


def rmsprop(g, state, h):
    return g / denominator(g, *state, h)


def rmsprop_centered(g, state, h):
    return g / centered_denominator(g, *state, h)


def rmsprop_momentum(g, state, h):
    v, b = state
    return b.mul_(h[2]).addcdiv_(g, denominator(g, v, h))


def rmsprop_centered_momentum(g, state, h):
    v, b, a = state
    return b.mul_(h[2]).addcdiv_(g, centered_denominator(g, v, a, h))


def denominator(g, v, h):
    weight, eps, mu = h
    v.mul_(1 - weight).addcmul_(g, g, value=weight)
    return v.sqrt().add_(eps)


def centered_denominator(g, v, a, h):
    weight, eps, mu = h
    v.mul_(1 - weight).addcmul_(g, g, value=weight)
    a.lerp_(g, weight)
    return v.addcmul(a, a, value=-1).sqrt_().add_(eps)


BLOCK = 1 << 18
"""Elements whose decayed gradient fits a core's second-level cache."""

NO_BIAS_CORRECTION = torch.tensor(2.0**100)
"""A step count at which Adam's bias corrections are 1 for every beta below 1."""


def fused(params, grads, states, t, group, scale):
    """torch has no fused RMSprop, but RMSprop is Adam with beta1 = 0 and no bias correction. Its first
    moment is then the gradient itself and may share its memory, unless the kernel would write a decayed
    or negated gradient there: those need a copy."""
    (v,) = states
    if scale is None and group["weight_decay"] == 0 and not group["maximize"]:
        return _adam_without_momentum(params, grads, v, group)
    for tensors in zip(params, grads, v):
        # In the order of memory: the engine hands over tensors of equal, dense strides.
        p, g, s = (x.detach().as_strided((x.numel(),), (1,)) for x in tensors)
        copy = torch.empty(min(BLOCK, g.numel()), dtype=g.dtype)
        for start in range(0, g.numel(), BLOCK):
            part = slice(start, start + BLOCK)
            block = copy[: g[part].numel()]
            if scale is None:
                block.copy_(g[part])
            else:
                torch.div(g[part], scale, out=block)
            _adam_without_momentum([p[part]], [block], [s[part]], group)


def _adam_without_momentum(params, grads, v, group):
    torch._fused_adam_(
        params, grads, grads, v, [], [NO_BIAS_CORRECTION] * len(params),
        lr=float(group["lr"]), beta1=0.0, beta2=float(group["alpha"]), weight_decay=float(group["weight_decay"]),
        eps=float(group["eps"]), amsgrad=False, maximize=group["maximize"],
    )  # fmt: skip


DTYPES = frozenset((torch.float32, torch.float64))
PLAIN = Rule("rmsprop", ("square_avg",), rmsprop, fused, DTYPES)
FROZEN_AVERAGE = Rule("rmsprop", ("square_avg",), rmsprop)
CENTERED = Rule("rmsprop_centered", ("square_avg", "grad_avg"), rmsprop_centered)
MOMENTUM = Rule("rmsprop_momentum", ("square_avg", "momentum_buffer"), rmsprop_momentum)
BOTH = Rule("rmsprop_centered_momentum", ("square_avg", "momentum_buffer", "grad_avg"), rmsprop_centered_momentum)


class RMSprop(FusedOptimizer, torch.optim.RMSprop):
    """RMSprop, with torch.optim.RMSprop's arguments and defaults."""

    def rule(self, group):
        if group["momentum"] > 0:
            return BOTH if group["centered"] else MOMENTUM
        if group["centered"]:
            return CENTERED
        return PLAIN if group["alpha"] < 1 else FROZEN_AVERAGE

    def hyper(self, group, t):
        return 1 - float(group["alpha"]), group["eps"], group["momentum"]
