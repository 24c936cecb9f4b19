"""RAdam: Adam whose adaptive step is rectified, and left out while too few gradients have been seen.

    m <- beta1 m + (1 - beta1) g        m_hat = m / (1 - beta1^t)
    v <- beta2 v + (1 - beta2) g^2      v_hat = v / (1 - beta2^t)

    rho_inf = 2 / (1 - beta2) - 1       rho = rho_inf - 2 t beta2^t / (1 - beta2^t)
    r = sqrt((rho - 4) (rho - 2) rho_inf / ((rho_inf - 4) (rho_inf - 2) rho))

    u = r m_hat sqrt(1 - beta2^t) / (sqrt(v) + eps) if rho > 5, else m_hat        p <- p - lr u

``weight_decay * p`` is added to g before the rule, with ``decoupled_weight_decay`` to u after it.

Sources: Liu et al., arXiv 1908.03265; defaults, state and the place of eps of torch.optim 2.13.
"""

from __future__ import annotations

import torch

from .blocks import blocks, parted_decay
from .columns import Number, maximum, where
from .normalized import normalized, step_uncorrected
from .optimizer import FusedOptimizer
from .rule import Rule, divisible


def radam(g, state, h):
    m, v = state
    weight1, weight2, eps, correction1, rectification = h
    m.lerp_(g, weight1)
    if rectification == 0:
        v.mul_(1 - weight2).addcmul_(g, g, value=weight2)
        return m.mul(correction1)
    return normalized(m.mul(correction1 * rectification), g, v, weight2, 1.0, eps)


def fused(params, grads, states, t, group, scale):
    """torch has no fused RAdam, but its fused Adam takes this step by another learning rate."""
    weight1, weight2, eps, correction1, rectification = hyper(group, t)
    lr, (decay, before) = float(group["lr"]), parted_decay(group)
    if rectification == 0:
        for p, g, m, v in blocks(before, scale, params, grads, *states):
            m.lerp_(g, weight1)
            v.mul_(1 - weight2).addcmul_(g, g, value=weight2)
            if decay != 0:
                p.mul_(1 - lr * decay)
            p.sub_(m, alpha=lr * correction1)
        return
    factor, decoupled = correction1 * rectification, bool(group["decoupled_weight_decay"])
    step_uncorrected(
        params, grads, *states, lr=factor * lr, beta1=1 - weight1, beta2=1 - weight2, eps=eps,
        weight_decay=decay / factor if decoupled else float(group["weight_decay"]), decoupled=decoupled,
        maximize=bool(group["maximize"]), scale=scale,
    )  # fmt: skip


def fused_narrow(p, g, states, t, group, scale):
    if hyper(group, t)[-1] == 0:
        return NotImplemented
    return fused([p], [g], [[x] for x in states], t, group, scale)


def hyper(group, t):
    beta1, beta2 = map(float, group["betas"])
    return 1 - beta1, 1 - beta2, divisible(group["eps"]), 1 / (1 - beta1**t), rectification(beta2, t)


STATES = ("exp_avg", "exp_avg_sq")
RADAM = Rule("radam", STATES, radam, fused, fused_narrow=fused_narrow, list_threads=1, squares=STATES[1:])


class RAdam(FusedOptimizer, torch.optim.RAdam):
    """RAdam, with torch.optim.RAdam's arguments and defaults."""

    def rule(self, group):
        return RADAM

    def hyper(self, group, t):
        return hyper(group, t)

    def decoupled(self, group):
        return group["decoupled_weight_decay"]


def rectification(beta2: float, t: Number) -> Number:
    """r sqrt(1 - beta2^t); 0 where the step is not adaptive yet."""
    longest = 2 / (1 - beta2) - 1
    if longest <= 5:
        return 0.0
    length = longest - 2 * t * beta2**t / (1 - beta2**t)
    rho = maximum(length, 5)
    ratio = (rho - 4) * (rho - 2) * longest / ((longest - 4) * (longest - 2) * rho)
    return where(length > 5, (ratio * (1 - beta2**t)) ** 0.5, 0.0)
