"""Adam and AdamW.

    m <- beta1 m + (1 - beta1) g          m_hat = m / (1 - beta1^t)
    v <- beta2 v + (1 - beta2) g^2        v_hat = v / (1 - beta2^t)
    u  = m_hat / (sqrt(v_hat) + eps)      p <- p - lr u

Adam adds ``weight_decay * p`` to g before the rule, AdamW adds it to u after the rule. With
``amsgrad`` the largest v so far takes the place of v in v_hat.

Sources: Kingma and Ba, arXiv 1412.6980; Loshchilov and Hutter, arXiv 1711.05101; Reddi et al.,
arXiv 1904.09237; defaults and state of torch.optim 2.13.
"""

from __future__ import annotations

import torch

from .optimizer import FusedOptimizer
from .rule import Rule, step_tensors


def adam(g, state, h):
    m, v = state
    weight1, weight2, eps, correction1, correction2 = h
    m.lerp_(g, weight1)
    v.mul_(1 - weight2).addcmul_(g, g, value=weight2)
    root_v_hat = v.sqrt().mul_(correction2)
    return m.mul(correction1).div_(root_v_hat.add_(eps))


def amsgrad(g, state, h):
    m, v, v_max = state
    weight1, weight2, eps, correction1, correction2 = h
    m.lerp_(g, weight1)
    v.mul_(1 - weight2).addcmul_(g, g, value=weight2)
    torch.maximum(v_max, v, out=v_max)
    root_v_hat = v_max.sqrt().mul_(correction2)
    return m.mul(correction1).div_(root_v_hat.add_(eps))


def fused(params, grads, states, t, group, scale):
    m, v, *v_max = states
    kernel = torch._fused_adamw_ if group["decoupled_weight_decay"] else torch._fused_adam_
    kernel(
        params, grads, m, v, v_max[0] if v_max else [], step_tensors(t, params),
        lr=float(group["lr"]), beta1=float(group["betas"][0]), beta2=float(group["betas"][1]),
        weight_decay=float(group["weight_decay"]), eps=float(group["eps"]),
        amsgrad=bool(v_max), maximize=group["maximize"], grad_scale=scale,
    )  # fmt: skip


DTYPES = frozenset((torch.float32, torch.float64))
SQUARES = ("exp_avg_sq", "max_exp_avg_sq")
ADAM = Rule("adam", ("exp_avg", "exp_avg_sq"), adam, fused, DTYPES, few=8, squares=SQUARES)
AMSGRAD = Rule("amsgrad", ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"), amsgrad, fused, DTYPES, few=8, squares=SQUARES)


class Adam(FusedOptimizer, torch.optim.Adam):
    """Adam, with torch.optim.Adam's arguments and defaults."""

    def rule(self, group):
        return AMSGRAD if group["amsgrad"] else ADAM

    def hyper(self, group, t):
        beta1, beta2 = map(float, group["betas"])
        return 1 - beta1, 1 - beta2, group["eps"], 1 / (1 - beta1**t), (1 - beta2**t) ** -0.5

    def decoupled(self, group):
        return group["decoupled_weight_decay"]


class AdamW(Adam, torch.optim.AdamW):
    """AdamW, with torch.optim.AdamW's arguments and defaults."""
