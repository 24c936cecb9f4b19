"""Small transforms around a rule: ``stage(x, p, *args) -> x``. A chain is a tuple of ``Stage``.

The gradient chain runs before the rule, the update chain after it. A feature that no group uses is
an absent stage; where only some groups use it, the others carry its neutral value in their row.

A stage of the update chain may need means over its tensor. It then is ``stage(u, p, g, *means, *args) -> u``, and each
mean is that of a term, ``term(u, p, g, state, *args) -> x``, of what the rule received and returned; see means.py.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .arithmetic import divide, sqrt

LEAST_AGREEMENT = tl.constexpr(1e-3)


class Stage(NamedTuple):
    """``fn`` is a bare jit function: wrapped in ``tl.constexpr`` inside a tuple it would be left out of
    the compile cache's key, and an edit of it would go unnoticed."""

    fn: object
    columns: tuple  # where its arguments stand in the group's row
    means: tuple  # where those that it needs stand among the tensor's


class Term(NamedTuple):
    """A bare jit function too."""

    fn: object
    columns: tuple


@triton.jit
def through(chain, x, p, arguments):
    """``arguments``: those of each stage."""
    for k in tl.static_range(len(chain)):
        x = chain[k].fn(x, p, *loaded(arguments[k]))
    return x


@triton.jit
def through_with_means(chain, x, p, g, arguments, means):
    for k in tl.static_range(len(chain)):
        if len(chain[k].means) == 0:
            x = chain[k].fn(x, p, *loaded(arguments[k]))
        else:
            found = narrowed(columns(means, chain[k].means), x.dtype)
            x = chain[k].fn(x, p, g, *found, *loaded(arguments[k]))
    return x


@triton.jit
def columns(row, places):
    """Where they stand."""
    return tl.tuple([row + c for c in places])


@triton.jit
def arguments_of(chain, row):
    return tl.tuple([columns(row, stage.columns) for stage in chain])


@triton.jit
def loaded(numbers):
    return tl.tuple([tl.load(x) for x in numbers])


@triton.jit
def narrowed(numbers, dtype: tl.constexpr):
    return tl.tuple([tl.load(x).to(dtype) for x in numbers])


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


@triton.jit
def damp(u, p, factor):
    """u factor"""
    return u * factor


@triton.jit
def agreement(u, p, g, state):
    """1 where u and g have the same sign, else 0"""
    # u g > 0 without the product, which may underflow.
    return tl.where(((u > 0) & (g > 0)) | ((u < 0) & (g < 0)), 1.0, 0.0).to(u.dtype)


@triton.jit
def cautious(u, p, g, mean):
    """u mask / max(mean, 1e-3), where mask is the agreement of u with g, and mean the mask's mean"""
    return u * divide(agreement(u, p, g, ()), tl.maximum(mean, LEAST_AGREEMENT, propagate_nan=tl.PropagateNan.ALL))


@triton.jit
def excess(u, p, g, state, eps_squared):
    """g^2 / max(v, eps^2) for a rule whose second state is v, an average of g^2"""
    v = state[1]
    # Not g g / v, which is NaN where the squares overflow.
    return g * divide(g, tl.maximum(v, eps_squared, propagate_nan=tl.PropagateNan.ALL))


@triton.jit
def limit_rms(u, p, g, mean, eps_squared):
    """u / max(1, RMS), where RMS = sqrt(mean excess)"""
    return divide(u, tl.maximum(sqrt(mean), 1.0, propagate_nan=tl.PropagateNan.ALL))


@triton.jit
def square_of_parameter(u, p, g, state, weight, adapts):
    """p^2"""
    return p * p


@triton.jit
def square_of_step(u, p, g, state, weight, adapts):
    """(u + weight p)^2"""
    u = decay(u, p, weight)
    return u * u


@triton.jit
def trust(u, p, g, of_parameter, of_step, weight, adapts):
    """u |p| / |u + weight p|, given the mean squares, where u holds the decay already; u where one of them or adapts is
    zero"""
    ratio = divide(sqrt(of_parameter), sqrt(of_step))
    return u * tl.where((of_parameter != 0) & (of_step != 0) & (adapts != 0), ratio, 1.0)
