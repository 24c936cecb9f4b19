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

from .blocks import blocks, scratch
from .columns import Number, number, product
from .normalized import normalized, step_normalized
from .optimizer import FusedOptimizer
from .rule import Rule, divisible


def nadam(g, state, h):
    m, v = state
    weight1, weight2, eps, g_weight, m_weight, correction2 = h
    return normalized(numerator(g, m, weight1, g_weight, m_weight), g, v, weight2, correction2, eps)


def numerator(g, m, weight1, g_weight, m_weight, out=None):
    m.lerp_(g, weight1)
    return torch.mul(m, m_weight, out=out).add_(g, alpha=g_weight)


def fused(params, grads, states, t, group, scale, mu_product):
    """torch has no fused NAdam, but its fused AdamW divides by the root and takes the step."""
    weight1, weight2, eps, g_weight, m_weight, correction2 = hyper(group, t, mu_product)
    decay = 0.0
    if group["decoupled_weight_decay"]:
        decay, group = float(group["weight_decay"]), {**group, "weight_decay": 0.0}
    for p, g, m, v in blocks(group, scale, params, grads, *states):
        above = numerator(g, m, weight1, g_weight, m_weight, out=scratch("numerator", p))
        step_normalized(p, above, g, v, weight2, correction2, eps, float(group["lr"]), decay)


def hyper(group, t, mu_product):
    beta1, beta2 = map(float, group["betas"])
    mu, mu_next = momentum(group, t), momentum(group, t + 1)
    p = number(product(mu_product, mu))
    g_weight, m_weight = (1 - mu) / (1 - p), mu_next / (1 - p * mu_next)
    return 1 - beta1, 1 - beta2, divisible(group["eps"]), g_weight, m_weight, (1 - beta2**t) ** -0.5


STATES = ("exp_avg", "exp_avg_sq")
NADAM = Rule("nadam", STATES, nadam, fused, scalars=("mu_product",), squares=STATES[1:])


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
