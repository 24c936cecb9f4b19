"""Stochastic gradient descent, with or without momentum.

    u = g                                                       p <- p - lr u

    momentum:   b <- mu b + (1 - dampening) g, but b_1 = g      u = b
    nesterov:   u = g + mu b

``weight_decay * p`` is added to g before the rule.

Sources: Sutskever et al., "On the importance of initialization and momentum in deep learning" (2013),
in torch's form, where the learning rate stands outside b; defaults and state of torch.optim 2.13.
"""

from __future__ import annotations

import torch

from .optimizer import FusedOptimizer
from .rule import Rule


def sgd(g, state, h):
    return g


def momentum(g, state, h):
    b = state[0]
    mu, weight, nesterov, first = h
    if first:
        b.copy_(g)
    else:
        b.mul_(mu).add_(g, alpha=weight)
    return g.add(b, alpha=mu) if nesterov else b


def fused(params, grads, states, t, group, scale):
    if not states and group["weight_decay"] == 0:
        # One addition: torch's plain call is faster than its fused kernel, and leaves the gradients alone.
        lr = float(group["lr"]) / (1 if scale is None else scale.item())
        torch._foreach_add_(params, grads, alpha=lr if group["maximize"] else -lr)
        return
    torch._fused_sgd_(
        params, grads, states[0] if states else [],
        lr=float(group["lr"]), momentum=float(group["momentum"]), dampening=float(group["dampening"]),
        weight_decay=float(group["weight_decay"]), nesterov=group["nesterov"], maximize=group["maximize"],
        is_first_step=bool(states) and t == 1, grad_scale=scale,
    )  # fmt: skip


# torch's kernel leaves whole SIMD blocks of 16-bit parameters unchanged (torch issue 191763).
DTYPES = frozenset((torch.float32, torch.float64))
PLAIN = Rule("sgd", (), sgd, fused, DTYPES, few=8, single_pass=True)
MOMENTUM = Rule("momentum", ("momentum_buffer",), momentum, fused, DTYPES, few=8)


class SGD(FusedOptimizer, torch.optim.SGD):
    """SGD, with torch.optim.SGD's arguments and defaults."""

    # torch keeps no step count for SGD: whether the buffer exists is all that the formula needs.
    counts_steps = False

    def rule(self, group):
        return MOMENTUM if group["momentum"] != 0 else PLAIN

    def hyper(self, group, t):
        if group["momentum"] == 0:
            return ()
        return group["momentum"], 1 - group["dampening"], float(group["nesterov"]), float(t == 1)
