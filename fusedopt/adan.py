"""Adan: Nesterov's momentum from differences of gradients.

    d = g - g_before, 0 at the first step
    m <- beta1 m + (1 - beta1) g                        m_hat = m / (1 - beta1^t)
    b <- beta2 b + (1 - beta2) d                        b_hat = b / (1 - beta2^t)
    v <- beta3 v + (1 - beta3) (g + beta2 d)^2          v_hat = v / (1 - beta3^t)
    u = (m_hat + beta2 b_hat) / (sqrt(v_hat) + eps)     p <- (p - lr u) / (1 + lr weight_decay)

With ``no_prox`` the decay is AdamW's instead, p <- p - lr (u + weight_decay p). The betas are those of the
authors' code; the paper writes 1 - beta for them. The gradient is remembered as the rule received it, clipped, and
with its sign changed, as in the authors' state.

Sources: Xie et al., arXiv 2208.06677; state and defaults of the authors' Adan.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .arguments import check_betas, check_nonnegative
from .blocks import blocks, parted_decay, scratch
from .capture import CapturableSettings
from .columns import where
from .normalized import normalized, step_normalized
from .optimizer import FusedOptimizer
from .rule import Rule, Stage, divisible


def adan(g, state, h):
    m, v, b, before = state
    _, _, weight3, _, eps, correction1, _, correction3, _ = h
    both, ahead = move(g, m, b, before, h)
    return normalized(both.mul_(correction1), ahead, v, weight3, correction3, eps)


def move(g, m, b, before, h, sum_out=None, d_out=None):
    """Returns what u divides, over the correction of m, and g + beta2 d."""
    weight1, weight2, _, beta2, _, correction1, correction2, _, first = h
    d = torch.zeros_like(g) if first else torch.add(g, before, out=d_out)
    m.lerp_(g, weight1)
    b.lerp_(d, weight2)
    torch.neg(g, out=before)
    both = torch.add(m, b, alpha=beta2 * correction2 / correction1, out=sum_out)
    return both, torch.add(g, d, alpha=beta2, out=d)


def fused(params, grads, states, t, group, scale, rates):
    """torch's fused AdamW divides the sum of both averages, which is its first moment, by the root of the average of
    other squares."""
    _, _, weight3, _, eps, correction1, _, correction3, _ = h = hyper(group, t)
    decay, plain = parted_decay(group)
    for p, g, m, v, b, before, lr in blocks(plain, scale, params, grads, *states, rates=rates):
        both, ahead = move(g, m, b, before, h, scratch("both", p), scratch("difference", p))
        size = correction1 * (lr if group["no_prox"] else lr / (1 + lr * decay))
        step_normalized(p, both, ahead, v, weight3, correction3, eps, size, decay / correction1)


def hyper(group, t):
    beta1, beta2, beta3 = map(float, group["betas"])
    corrections = 1 / (1 - beta1**t), 1 / (1 - beta2**t), (1 - beta3**t) ** -0.5
    return 1 - beta1, 1 - beta2, 1 - beta3, beta2, divisible(group["eps"]), *corrections, where(t == 1, 1.0, 0.0)


STATES = ("exp_avg", "exp_avg_sq", "exp_avg_diff", "neg_pre_grad")
ADAN = Rule("adan", STATES, adan, fused, takes_rates=True, squares=("exp_avg_sq",))


class Adan(FusedOptimizer):
    """Adan.

    Args:
        params: parameters, named parameters, or groups of them.
        lr (float or 1-element tensor): the learning rate.
        betas: how much of the averages of g, of d and of the squares is kept at each step.
        eps (float): added to the root of v.
        weight_decay (float): the strength of the decay.
        no_prox (bool): decay as in AdamW instead of the paper's proximal one.
        maximize (bool): ascend instead of descend.
    """

    settings_class = CapturableSettings
    capturable: bool

    def __init__(
        self, params: ParamsT, lr: float | Tensor = 1e-3, betas: tuple[float, float, float] = (0.98, 0.92, 0.99),
        eps: float = 1e-8, weight_decay: float = 0.0, no_prox: bool = False, *, maximize: bool = False, **settings: Any,
    ) -> None:  # fmt: skip
        check_nonnegative(lr=lr, eps=eps, weight_decay=weight_decay)
        check_betas(betas, 3)
        defaults = {
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "no_prox": no_prox,
            "maximize": maximize,
        }  # fmt: skip
        super().__init__(params, defaults, **settings)

    def rule(self, group):
        return ADAN

    def hyper(self, group, t):
        return hyper(group, t)

    def decoupled(self, group):
        return True

    def update(self, group, t):
        update = super().update(group, t)
        strength = 0.0 if group["no_prox"] else float(group["weight_decay"])
        # (p - lr u) / (1 + lr weight_decay) = p - lr (u + weight_decay p) / (1 + lr weight_decay). Whether the stage is
        # there must not depend on lr, or a schedule that passes through 0 would compile another kernel.
        damp = Stage("damp", (1 / (1 + update.lr * strength) if strength else 1.0,), None if strength else (1.0,))
        return update._replace(on_update=(*update.on_update, damp))
