"""Resilient backpropagation: the sign of the gradient, and a step of its own for every element.

    s <- s eta_plus   if g has the sign of the gradient before
    s <- s eta_minus  if it has the other, and then g <- 0
    s <- min(max(s, step_min), step_max)        u = sign(g) s        p <- p - u

s begins at lr, which has no further part in it.

Sources: Riedmiller and Braun, "A direct adaptive method for faster backpropagation learning: the RPROP algorithm"
(1993); defaults and state of torch.optim 2.13.
"""

from __future__ import annotations

import torch

from .optimizer import FusedOptimizer
from .rule import Rule


def rprop(g, state, h):
    previous, s = state
    eta_minus, eta_plus, step_min, step_max = h
    agreement = previous.mul_(g).sign_()
    # eta_minus, 1 or eta_plus: eta_plus is above 1, so 1 + eta_plus and 1 - eta_plus lie outside of the limits.
    s.mul_(agreement.mul(eta_plus).add_(1).clamp_(eta_minus, eta_plus)).clamp_(step_min, step_max)
    turned = agreement.lt(0)
    previous.copy_(g).masked_fill_(turned, 0)
    return previous.sign().mul_(s)


STATES = ("prev", "step_size")
# Step sizes differ by far more than 127 times.
RPROP = Rule("rprop", STATES, rprop, uncoded=STATES)


class Rprop(FusedOptimizer, torch.optim.Rprop):
    """Rprop, with torch.optim.Rprop's arguments and defaults."""

    begins_at_rate = True

    def rule(self, group):
        return RPROP

    def hyper(self, group, t):
        return *map(float, group["etas"]), *map(float, group["step_sizes"])

    def lr(self, group, t):
        return 1.0

    def initial_value(self, group, key):
        return float(group["lr"]) if key == "step_size" else 0.0

    def decays(self, group):
        return 0.0, 0.0
