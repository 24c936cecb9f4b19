"""NAdam: Adam with Nesterov's momentum, whose coefficient grows towards beta1.

    m <- beta1 m + (1 - beta1) g
    v <- beta2 v + (1 - beta2) g^2      v_hat = v / (1 - beta2^t)

    mu_t = beta1 (1 - 0.96^(t momentum_decay) / 2)        P_t = mu_1 mu_2 ... mu_t

    u = ((1 - mu_t) g / (1 - P_t) + mu_{t+1} m / (1 - P_{t+1})) / (sqrt(v_hat) + eps)        p <- p - lr u

``weight_decay * p`` is added to g before the rule, with ``decoupled_weight_decay`` to u after it. The product P
is a number of each parameter, ``mu_product`` in its state.

Sources: Dozat, "Incorporating Nesterov momentum into Adam" (2016); defaults and state of torch.optim 2.13.
"""

from __future__ import annotations

import torch

from .blocks import blocks, is_plain, parted_decay, scratch
from .columns import Number, number, product
from .normalized import normalized, step_uncorrected
from .optimizer import FusedOptimizer
from .rule import Rule, divisible


def nadam(g, state, h):
    m, v = state
    weight1, weight2, eps, g_weight, m_weight, correction2 = h
    m.lerp_(g, weight1)
    return normalized(m.mul(m_weight).add_(g, alpha=g_weight), g, v, weight2, correction2, eps)


def fused(params, grads, states, t, group, scale, mu_product):
    """torch has no fused NAdam, but its fused Adam takes this step by another first moment: what is divided is also a
    mean of m, before it moves, and g."""
    weight1, weight2, eps, g_weight, m_weight, correction2 = hyper(group, t, mu_product)
    from_m, from_g = m_weight * (1 - weight1), m_weight * weight1 + g_weight
    factor = (from_m + from_g) / correction2
    decay, before = parted_decay(group)
    for p, g, m, v in blocks(before, scale, params, grads, *states):
        ahead = scratch("ahead", p).copy_(m)
        m.lerp_(g, weight1)
        step_uncorrected(
            [p], [g], [ahead], [v], lr=factor * float(group["lr"]), beta1=from_m / (from_m + from_g), beta2=1 - weight2,
            eps=eps / correction2, weight_decay=decay / factor, decoupled=True,
        )  # fmt: skip


def fused_narrow(p, g, states, t, group, scale, mu_product):
    # A copy of the gradient would be rounded, and where g weighs more than m, lerp_ rounds more than once.
    if float(group["betas"][0]) <= 0.5 or not is_plain(parted_decay(group)[1], scale):
        return NotImplemented
    return fused([p], [g], [[x] for x in states], t, group, scale, mu_product)


def hyper(group, t, mu_product):
    beta1, beta2 = map(float, group["betas"])
    mu, mu_next = momentum(group, t), momentum(group, t + 1)
    p = number(product(mu_product, mu))
    g_weight, m_weight = (1 - mu) / (1 - p), mu_next / (1 - p * mu_next)
    return 1 - beta1, 1 - beta2, divisible(group["eps"]), g_weight, m_weight, (1 - beta2**t) ** -0.5


STATES = ("exp_avg", "exp_avg_sq")
NADAM = Rule("nadam", STATES, nadam, fused, fused_narrow=fused_narrow, scalars=("mu_product",), squares=STATES[1:])


class NAdam(FusedOptimizer, torch.optim.NAdam):
    """NAdam, with torch.optim.NAdam's arguments and defaults."""

    def rule(self, group):
        return NADAM

    def hyper(self, group, t, mu_product):
        return hyper(group, t, mu_product)

    def next_scalars(self, group, t, mu_product):
        return (product(mu_product, momentum(group, t)),)

    def initial_value(self, group, key):
        return 1.0 if key == "mu_product" else 0.0

    def decoupled(self, group):
        return group["decoupled_weight_decay"]


def momentum(group: dict, t: Number) -> Number:
    """mu_t"""
    return float(group["betas"][0]) * (1 - 0.5 * 0.96 ** (t * group["momentum_decay"]))
