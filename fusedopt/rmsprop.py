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
from .normalized import step_normalized, step_uncorrected
from .optimizer import FusedOptimizer
from .rule import Rule, divisible, root_of_sum, root_plus_eps
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
    mean_square(g, v, h)
    a.lerp_(g, h[0])
    return torch.addcmul(v, a, a, value=-1)


# torch has no fused RMSprop, but its fused Adam and AdamW can do the work: see normalized.py. Their square root and
# division take a third of the time of torch's separate calls.


def fused(params, grads, states, t, group, scale):
    """Adam with beta1 = 0: its first moment is the gradient itself, and may share its memory, since the kernel
    writes back what it read (but for the sign of a zero, and NaN for inf), or what clipping made of it."""
    if is_plain(group, None):
        _adam(params, grads, grads, *states, group, scale)
        return
    weight, eps, _ = hyper(group)
    for p, g, v in blocks(group, scale, params, grads, *states):
        step_normalized(p, g, g, v, weight, 1.0, eps, float(group["lr"]))


def fused_narrow(p, g, states, t, group, scale):
    """The same, and what else comes before the rule stays in the kernel: a copy would be rounded."""
    if scale is not None:
        g = scratch("gradient", p).copy_(g)
    moment = g if is_plain(group, None) else scratch("moment", p).zero_()
    _adam([p], [g], [moment], states, group, scale)


def _adam(params, grads, moments, squares, group, scale):
    step_uncorrected(
        params, grads, moments, squares, lr=float(group["lr"]), beta1=0.0, beta2=float(group["alpha"]),
        eps=divisible(group["eps"]), weight_decay=float(group["weight_decay"]), maximize=bool(group["maximize"]),
        scale=scale,
    )  # fmt: skip


def fused_momentum(params, grads, states, t, group, scale, rates):
    weight, eps, mu = hyper(group)
    before, within = _parted(scale, group)
    for p, g, v, b, lr in blocks(group, before, params, grads, *states, rates=rates):
        # As its parameter, with lr = -1 and decay mu - 1, b becomes mu b + u.
        step_uncorrected(
            [b], [g], [g], [v], lr=-1.0, beta1=0.0, beta2=1 - weight, eps=eps,
            weight_decay=mu - 1, decoupled=True, scale=within,
        )  # fmt: skip
        p.sub_(b, alpha=lr)


def fused_centered(params, grads, states, t, group, scale, rates):
    h = hyper(group)
    before, within = _parted(scale, group)
    for p, g, v, a, lr in blocks(group, before, params, grads, *states, rates=rates):
        step_normalized(p, _writable(g), a, _half_moved(g, v, a, h, within), -1.0, 1.0, h[1], lr)


def fused_centered_momentum(params, grads, states, t, group, scale, rates):
    h = hyper(group)
    before, within = _parted(scale, group)
    for p, g, v, b, a, lr in blocks(group, before, params, grads, *states, rates=rates):
        half = _half_moved(g, v, a, h, within)
        step_normalized(b, _writable(g), a, half, -1.0, 1.0, h[1], lr=-1.0, decay=h[2] - 1)
        p.sub_(b, alpha=lr)


def _parted(scale, group):
    """The scale for what comes before the kernel, and for the kernel, which clips in the same pass."""
    return (None, scale) if is_plain(group, None) else (scale, None)


def _half_moved(g, v, a, h, scale):
    """Half of v after both averages have moved: the kernel itself makes 2 (v / 2) - a^2 of it."""
    half = scratch("half", v)
    # One call of Adam. What becomes of its parameter does not matter.
    step_uncorrected([half], [g], [a], [v], lr=0.0, beta1=1 - h[0], beta2=1 - h[0], eps=h[1], scale=scale)
    return torch.mul(v, HALF, out=half)


HALF = torch.tensor(0.5, device="cpu")


def _writable(g):
    """The gradient, or a copy where KEEP is not 1: it takes half an ulp from what it should leave alone."""
    return g.clone() if g.dtype == torch.float64 else g


def hyper(group):
    return 1 - float(group["alpha"]), divisible(group["eps"]), float(group["momentum"])


SQUARES = ("square_avg",)
# A root of a difference of states: rounded ones could make it negative.
EXACT = ("square_avg", "grad_avg")
PLAIN = Rule(
    "rmsprop", SQUARES, rmsprop, fused, fused_narrow=fused_narrow, list_threads=1,
    lists=lambda group: is_plain(group, None), squares=SQUARES,
)  # fmt: skip
MOMENTUM = Rule(
    "rmsprop_momentum",
    (*SQUARES, "momentum_buffer"),
    rmsprop_momentum,
    fused_momentum,
    takes_rates=True,
    squares=SQUARES,
)
CENTERED = Rule("rmsprop_centered", EXACT, rmsprop_centered, fused_centered, takes_rates=True, exact=EXACT)
BOTH = Rule(
    "rmsprop_centered_momentum",
    ("square_avg", "momentum_buffer", "grad_avg"),
    rmsprop_centered_momentum,
    fused_centered_momentum,
    takes_rates=True,
    exact=EXACT,
)


# With alpha = 1 the average never changes; as a beta of Adam's, 1 would have a bias correction of 0.
WITHOUT_FUSED = {rule.name: rule._replace(fused=None) for rule in (PLAIN, MOMENTUM, CENTERED, BOTH)}

EPS_INSIDE = {
    rule.name: rule._replace(name=f"{rule.name}_eps_inside", twin=partial(rule.twin, denominator=root_of_sum))
    for rule in WITHOUT_FUSED.values()
}


class RMSprop(FusedOptimizer, torch.optim.RMSprop):
    """RMSprop, with torch.optim.RMSprop's arguments and defaults."""

    settings_class = EpsSettings
    eps_inside_sqrt: bool

    def rule(self, group):
        if group["momentum"] > 0:
            rule = BOTH if group["centered"] else MOMENTUM
        else:
            rule = CENTERED if group["centered"] else PLAIN
        if self._settings.eps_inside_sqrt and group["eps"] != 0:
            return EPS_INSIDE[rule.name]
        return rule if group["alpha"] < 1 else WITHOUT_FUSED[rule.name]

    def hyper(self, group, t):
        return hyper(group)
