"""Small transforms around a rule: ``stage(x, p, *args) -> x``. A chain is a tuple of ``Stage``.

The gradient chain runs before the rule, the update chain after it. A feature that no group uses is
an absent stage; where only some groups use it, the others carry its neutral value in their row.
"""

from typing import NamedTuple

import triton
import triton.language as tl


class Stage(NamedTuple):
    """``fn`` is a bare jit function: wrapped in ``tl.constexpr`` inside a tuple it would be left out of
    the compile cache's key, and an edit of it would go unnoticed."""

    fn: object
    columns: tuple  # where its arguments stand in the group's row


@triton.jit
def through(chain, x, p, row):
    for k in tl.static_range(len(chain)):
        x = chain[k].fn(x, p, *columns(row, chain[k].columns))
    return x


@triton.jit
def columns(row, places):
    return tl.tuple([tl.load(row + c) for c in places])


@triton.jit
def clip_value(g, p, low, high):
    """min(max(g, low), high); NaN stays NaN"""
    g = tl.maximum(g, low, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(g, high, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def maximize(g, p, sign):
    """sign is -1 in groups that ascend, else 1"""
    return g * sign


@triton.jit
def decay(x, p, weight):
    """x + weight p: L2 decay in the gradient chain, decoupled decay in the update chain"""
    return tl.where(weight != 0, x + weight * p, x)
