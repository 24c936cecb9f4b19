"""The small transforms around a rule in plain torch: twins of ``kernels/stages.py``."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

import torch
from torch import Tensor

from . import means
from .rule import Stage

stages = {
    "clip_value": lambda g, p, low, high: g.clamp(low, high),
    "maximize": lambda g, p, sign: g * sign,
    "decay": lambda x, p, weight: x.add(p, alpha=weight),
    "damp": lambda u, p, factor: u * factor,
    "cautious": lambda u, p, g, mean: u * means.agreement(u, p, g, ()).div_(mean.clamp(min=1e-3)),
    "limit_rms": lambda u, p, g, mean, eps_squared: u / mean.sqrt().clamp_(min=1.0),
    "trust": lambda u, p, g, of_parameter, of_step, weight, adapts: u * means.trust_ratio(of_parameter, of_step),
}


def through(chain: Sequence[Stage], x: Tensor, p: Tensor, g: Tensor | None = None, found: Sequence = ()) -> Tensor:
    """``found`` are the means that stages need, in their order."""
    found = iter(found)
    for stage in chain:
        needs = (g, *islice(found, len(stage.terms))) if stage.terms else ()
        if stage.args != stage.neutral:
            x = stages[stage.name](x, p, *needs, *stage.args)
    return x


def follow(averages: list[Tensor], params: list[Tensor], weight: float) -> None:
    """a <- a + weight (p - a); a copy where the weight is 1."""
    if weight == 1:
        torch._foreach_copy_(averages, params)
    else:
        if params[0].dtype != averages[0].dtype:  # those of 16-bit parameters are float32
            params = [p.to(averages[0].dtype) for p in params]
        torch._foreach_lerp_(averages, params, weight)
