"""Adam and AdamW.

    m <- beta1 m + (1 - beta1) g          m_hat = m / (1 - beta1^t)
    v <- beta2 v + (1 - beta2) g^2        v_hat = v / (1 - beta2^t)
    u  = m_hat / (sqrt(v_hat) + eps)      p <- p - lr u

    eps_inside_sqrt:          u = m_hat / sqrt(v_hat + eps)
    bias_correction=False:    m_hat = m, v_hat = v

Adam adds ``weight_decay * p`` to g before the rule, AdamW adds it to u after the rule. With
``amsgrad`` the largest v so far takes the place of v in v_hat. With ``eps=0`` a parameter whose gradient was always
zero stays put, where torch makes it NaN.

Sources: Kingma and Ba, arXiv 1412.6980; Loshchilov and Hutter, arXiv 1711.05101; Reddi et al.,
arXiv 1904.09237; defaults and state of torch.optim 2.13.
"""

from __future__ import annotations

import dataclasses
from functools import partial

import torch

from .columns import number
from .normalized import step_uncorrected
from .optimizer import FusedOptimizer
from .rule import EVERY_DTYPE, FOREVER, Rule, divisible, root_of_sum, root_plus_eps, step_tensors
from .setting_checks import flag
from .settings import EpsSettings, setting


def adam(g, state, h, denominator=root_plus_eps):
    m, v = state
    weight1, weight2, eps, correction1, correction2 = h
    m.lerp_(g, weight1)
    v.mul_(1 - weight2).addcmul_(g, g, value=weight2)
    return m.mul(correction1).div_(denominator(v, eps, correction2))


def amsgrad(g, state, h, denominator=root_plus_eps):
    m, v, v_max = state
    weight1, weight2, eps, correction1, correction2 = h
    m.lerp_(g, weight1)
    v.mul_(1 - weight2).addcmul_(g, g, value=weight2)
    torch.maximum(v_max, v, out=v_max)
    return m.mul(correction1).div_(denominator(v_max, eps, correction2))


def fused(params, grads, states, t, group, scale):
    _fused(params, grads, states, step_tensors(t, params), group, scale)


def fused_uncorrected(params, grads, states, t, group, scale):
    _fused(params, grads, states, [FOREVER] * len(params), group, scale)


def _fused(params, grads, states, steps, group, scale):
    m, v, *v_max = states
    kernel = torch._fused_adamw_ if group["decoupled_weight_decay"] else torch._fused_adam_
    kernel(
        params, grads, m, v, v_max[0] if v_max else [], steps,
        lr=float(group["lr"]), beta1=float(group["betas"][0]), beta2=float(group["betas"][1]),
        weight_decay=float(group["weight_decay"]), eps=divisible(group["eps"]),
        amsgrad=bool(v_max), maximize=bool(group["maximize"]), grad_scale=scale,
    )  # fmt: skip


def fused_direction(p, g, m, v, u, h, decay):
    """AdamW's direction with its decay, for what scales it by sums over all of it: u, 0 before. m and v move on."""
    weight1, weight2, eps, correction1, correction2 = h
    step_uncorrected(
        [u], [g], [m], [v], lr=-correction1 / correction2, beta1=1 - weight1, beta2=1 - weight2, eps=eps / correction2
    )
    if decay != 0:
        u.add_(p, alpha=decay)


def hyper(group, t, bias_correction=True):
    """The weights of g and g^2, eps, and what makes m_hat of m and sqrt(v_hat) of sqrt(v)."""
    beta1, beta2 = map(number, group["betas"])
    eps = divisible(group["eps"])
    if not bias_correction:
        return 1 - beta1, 1 - beta2, eps, 1.0, 1.0
    return 1 - beta1, 1 - beta2, eps, 1 / (1 - beta1**t), (1 - beta2**t) ** -0.5


STATES = ("exp_avg", "exp_avg_sq")
MAX_STATES = (*STATES, "max_exp_avg_sq")
SQUARES = MAX_STATES[1:]
ADAM = Rule("adam", STATES, adam, fused, EVERY_DTYPE, list_threads=1, squares=SQUARES)
AMSGRAD = Rule("amsgrad", MAX_STATES, amsgrad, fused, EVERY_DTYPE, list_threads=1, squares=SQUARES)
ADAM_EPS_INSIDE = Rule("adam_eps_inside", STATES, partial(adam, denominator=root_of_sum), squares=SQUARES)
AMSGRAD_EPS_INSIDE = Rule("amsgrad_eps_inside", MAX_STATES, partial(amsgrad, denominator=root_of_sum), squares=SQUARES)
UNCORRECTED = {rule.name: rule._replace(fused=fused_uncorrected) for rule in (ADAM, AMSGRAD)}


@dataclasses.dataclass(kw_only=True)
class AdamSettings(EpsSettings):
    bias_correction: bool = setting(
        True,
        flag,
        """(bool): False takes m and v as they are, for m_hat and v_hat.""",
    )


class Adam(FusedOptimizer, torch.optim.Adam):
    """Adam, with torch.optim.Adam's arguments and defaults."""

    settings_class = AdamSettings
    eps_inside_sqrt: bool
    bias_correction: bool

    def rule(self, group):
        settings = self._settings
        if settings.eps_inside_sqrt and group["eps"] != 0:
            return AMSGRAD_EPS_INSIDE if group["amsgrad"] else ADAM_EPS_INSIDE
        rule = AMSGRAD if group["amsgrad"] else ADAM
        return rule if settings.bias_correction else UNCORRECTED[rule.name]

    def hyper(self, group, t):
        return hyper(group, t, self._settings.bias_correction)

    def decoupled(self, group):
        return group["decoupled_weight_decay"]


class AdamW(Adam, torch.optim.AdamW):
    """AdamW, with torch.optim.AdamW's arguments and defaults."""
