"""Averaged stochastic gradient descent.

    u = g                  p <- p - eta (u + lambd p)            a <- a + mu (p - a)
    eta <- lr / (1 + lambd lr t)^alpha                           mu <- 1 / max(1, t - t0)

``weight_decay * p`` is added to g before the rule. eta begins at lr and mu at 1; both are numbers of each
parameter, and what the t-th step makes of them is used by the next one. The average a is ``ax`` in its state.
Unless lambd is 0, an infinite parameter becomes NaN, as with torch's foreach; torch's for-loop keeps it, since it
multiplies p by 1 - eta lambd, whose rounding adds up over the steps.

Sources: Polyak and Juditsky, "Acceleration of stochastic approximation by averaging" (1992), in the form of
Bottou's sgd-2; defaults and state of torch.optim 2.13.
"""

from __future__ import annotations

import torch

from .columns import maximum, number, scalar
from .optimizer import FusedOptimizer
from .rule import Rule


def asgd(g, state, h):
    return g


def fused(params, grads, states, t, group, scale, eta, mu):
    """torch has no fused ASGD, but SGD with another rate and more decay is the same step."""
    torch._fused_sgd_(
        params, grads, [], lr=float(eta), weight_decay=float(group["weight_decay"]) + float(group["lambd"]),
        momentum=0.0, dampening=0.0, nesterov=False, maximize=bool(group["maximize"]), is_first_step=False,
        grad_scale=scale,
    )  # fmt: skip


ASGD_RULE = Rule("asgd", (), asgd, fused, averages=("ax",), scalars=("eta", "mu"), list_threads=1)


class ASGD(FusedOptimizer, torch.optim.ASGD):
    """ASGD, with torch.optim.ASGD's arguments and defaults."""

    begins_at_rate = True

    def rule(self, group):
        return ASGD_RULE

    def hyper(self, group, t, eta, mu):
        # What the next step's rates are made of: if these are no numbers, that is an error before the update.
        number(group["alpha"]), number(group["t0"])
        return ()

    def lr(self, group, t, eta, mu):
        return number(eta)

    def averages(self, group, t, eta, mu):
        return (number(mu),)

    def next_scalars(self, group, t, eta, mu):
        lr = number(group["lr"])
        eta, mu = lr / (1 + group["lambd"] * lr * t) ** group["alpha"], 1 / maximum(t - group["t0"], 1)
        # Rounded to the default dtype on their way, as in torch.
        return scalar(eta), scalar(mu)

    def initial_value(self, group, key):
        return {"eta": float(group["lr"]), "mu": 1.0, "ax": 0.0}[key]

    def decays(self, group):
        return float(group["weight_decay"]), float(group["lambd"])
