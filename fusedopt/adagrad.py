"""Adagrad.

    G <- G + g^2        u = g / (sqrt(G) + eps)        p <- p - lr / (1 + (t - 1) lr_decay) u

    eps_inside_sqrt:    u = g / sqrt(G + eps)

``weight_decay * p`` is added to g before the rule; G starts at ``initial_accumulator_value``. With ``eps=0`` a
parameter whose gradient was always zero stays put, where torch makes it NaN.

Sources: Duchi, Hazan and Singer, JMLR 12 (2011); defaults and state of torch.optim 2.13.
"""

from __future__ import annotations

from functools import partial

import torch

from .capture import CapturableEpsSettings
from .columns import number
from .optimizer import FusedOptimizer
from .rule import Rule, divisible, root_of_sum, root_plus_eps, step_tensors


def adagrad(g, state, h, denominator=root_plus_eps):
    sum = state[0]
    eps = h[0]
    sum.addcmul_(g, g)
    return torch.div(g, denominator(sum, eps))


def fused(params, grads, states, t, group, scale):
    torch._fused_adagrad_(
        params, grads, states[0], step_tensors(t, params),
        lr=float(group["lr"]), lr_decay=float(group["lr_decay"]), weight_decay=float(group["weight_decay"]),
        eps=divisible(group["eps"]), maximize=bool(group["maximize"]), grad_scale=scale,
    )  # fmt: skip


STATES = ("sum",)
ADAGRAD = Rule(
    "adagrad", STATES, adagrad, fused, list_threads=1, squares=STATES,
    # In codes a sum that began to grow late would soon stop, far below those that it should reach.
    uncoded=STATES,
)  # fmt: skip
EPS_INSIDE = ADAGRAD._replace(name="adagrad_eps_inside", twin=partial(adagrad, denominator=root_of_sum), fused=None)


class Adagrad(FusedOptimizer, torch.optim.Adagrad):
    """Adagrad, with torch.optim.Adagrad's arguments and defaults."""

    settings_class = CapturableEpsSettings
    eps_inside_sqrt: bool
    capturable: bool

    def rule(self, group):
        return EPS_INSIDE if self._settings.eps_inside_sqrt and group["eps"] != 0 else ADAGRAD

    def hyper(self, group, t):
        return (divisible(group["eps"]),)

    def lr(self, group, t):
        return number(group["lr"]) / (1 + (t - 1) * group["lr_decay"])

    def initial_value(self, group, key):
        return group["initial_accumulator_value"]
