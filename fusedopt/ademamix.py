"""AdEMAMix: Adam with a second, slow average of the gradient.

    m1 <- beta1 m1 + (1 - beta1) g        m1_hat = m1 / (1 - beta1^t)
    m2 <- beta3 m2 + (1 - beta3) g
    v  <- beta2 v + (1 - beta2) g^2       v_hat = v / (1 - beta2^t)
    u  = (m1_hat + alpha m2) / (sqrt(v_hat) + eps)        p <- p - lr (u + weight_decay p)

Over the first ``alpha_warmup`` steps alpha grows linearly from 0, and over the first ``beta3_warmup`` steps the
half-life of m2 grows linearly from that of beta1 to that of beta3.

Sources: Pagliardini, Ablin and Grangier, arXiv 2409.03137; state and defaults of the authors' code.
"""

from __future__ import annotations

import math
import numbers
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .arguments import check_betas, check_nonnegative
from .blocks import blocks, parted_decay, scratch
from .capture import CapturableSettings
from .columns import Number, minimum, where
from .normalized import normalized, step_normalized
from .optimizer import FusedOptimizer
from .rule import Rule, divisible


def ademamix(g, state, h):
    fast, slow, v = state
    _, weight2, _, eps, correction1, correction2, _ = h
    return normalized(move(g, fast, slow, h).mul_(correction1), g, v, weight2, correction2, eps)


def move(g, fast, slow, h, out=None):
    """Returns what u divides, over the correction of m1."""
    weight1, _, weight3, _, correction1, _, alpha = h
    fast.lerp_(g, weight1)
    slow.lerp_(g, weight3)
    return torch.add(fast, slow, alpha=alpha / correction1, out=out)


def fused(params, grads, states, t, group, scale, rates):
    """torch's fused AdamW divides the sum of both averages, which is its first moment."""
    _, weight2, _, eps, correction1, correction2, _ = h = hyper(group, t)
    decay, before = parted_decay(group)
    for p, g, fast, slow, v, lr in blocks(before, scale, params, grads, *states, rates=rates):
        both = move(g, fast, slow, h, scratch("both", p))
        step_normalized(p, both, g, v, weight2, correction2, eps, lr * correction1, decay / correction1)


def hyper(group, t):
    beta1, beta2, beta3 = map(float, group["betas"])
    alpha = float(group["alpha"]) * _share(t, group["alpha_warmup"])
    if group["beta3_warmup"]:
        beta3 = _between(beta1, beta3, _share(t, group["beta3_warmup"]))
    corrections = 1 / (1 - beta1**t), (1 - beta2**t) ** -0.5
    return 1 - beta1, 1 - beta2, 1 - beta3, divisible(group["eps"]), *corrections, alpha


ADEMAMIX = Rule(
    "ademamix",
    ("exp_avg_fast", "exp_avg_slow", "exp_avg_sq"),
    ademamix,
    fused,
    takes_rates=True,
    squares=("exp_avg_sq",),
    # It moves by a ten-thousandth of a gradient at each step, far less than a code.
    uncoded=("exp_avg_slow",),
)


class AdEMAMix(FusedOptimizer):
    """AdEMAMix.

    Args:
        params: parameters, named parameters, or groups of them.
        lr (float or 1-element tensor): the learning rate.
        betas: how much of the fast average, of the squares' and of the slow average is kept at each step.
        alpha (float): how much the slow average counts.
        beta3_warmup, alpha_warmup (int, optional): the lengths of the two warm-ups in steps; the paper takes the
            length of the training.
        eps (float): added to the root of v.
        weight_decay (float): decoupled.
        maximize (bool): ascend instead of descend.
    """

    settings_class = CapturableSettings
    capturable: bool

    def __init__(
        self, params: ParamsT, lr: float | Tensor = 1e-3, betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
        alpha: float = 2.0, beta3_warmup: int | None = None, alpha_warmup: int | None = None, eps: float = 1e-8,
        weight_decay: float = 0.0, *, maximize: bool = False, **settings: Any,
    ) -> None:  # fmt: skip
        check_nonnegative(lr=lr, alpha=alpha, eps=eps, weight_decay=weight_decay)
        check_betas(betas, 3)
        for name, steps in (("beta3_warmup", beta3_warmup), ("alpha_warmup", alpha_warmup)):
            if steps is not None and not (isinstance(steps, numbers.Integral) and steps >= 0):
                raise ValueError(f"Invalid {name}: {steps!r}; give a number of steps, or None")
        defaults = {
            "lr": lr, "betas": betas, "alpha": alpha, "beta3_warmup": beta3_warmup, "alpha_warmup": alpha_warmup,
            "eps": eps, "weight_decay": weight_decay, "maximize": maximize,
        }  # fmt: skip
        super().__init__(params, defaults, **settings)

    def rule(self, group):
        return ADEMAMIX

    def hyper(self, group, t):
        return hyper(group, t)

    def decoupled(self, group):
        return True


def _share(t: Number, steps: int | None) -> Number:
    """How much of a warm-up is done at the ``t``-th step."""
    return minimum(t / steps, 1.0) if steps else 1.0


def _between(start: float, end: float, share: Number) -> Number:
    """The beta whose half-life lies that share of the way from one's to the other's."""
    life = (1 - share) * _half_life(start) + share * _half_life(end)
    return where(share == 1, end, 0.5 ** (1 / (life + 1)))


def _half_life(beta: float) -> float:
    # The authors' small number keeps a beta of 0 out of the logarithm.
    return math.log(0.5) / math.log(beta + 1e-8) - 1
