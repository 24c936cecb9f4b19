"""What the rules are made of: division, roots and averages as exact as torch's, or more so."""

import triton
import triton.language as tl


@triton.jit
def divide(x, y):
    """x / y, correctly rounded: in float32 the plain ``/`` may be off by 2 ulp on a GPU."""
    if x.dtype == tl.float32:
        return tl.math.div_rn(x, y)
    else:
        return x / y


@triton.jit
def sqrt(x):
    """The square root, correctly rounded."""
    if x.dtype == tl.float32:
        return tl.math.sqrt_rn(x)
    else:
        return tl.sqrt(x)


@triton.jit
def ema(average, x, weight):
    """(1 - weight) average + weight x, with weight = 1 - beta formed in float64."""
    return average + weight * (x - average)


@triton.jit
def ema_of_squares(average, x, weight):
    """``ema`` of x^2, with one weight for all. An average that once overflowed stays infinite, as in torch, instead of
    NaN."""
    square = x * x
    moved = tl.where(average < float("inf"), average + weight * (square - average), average)
    # From the nearer end: a small square would drown in the rounding of a large average that hardly counts any more,
    # and the root of nothing is what others are divided by. By a branch: to select for each element takes longer.
    if weight >= 0.5:
        moved = tl.where(square < float("inf"), square + (weight - 1) * (square - average), square)
    return moved


@triton.jit
def sign(x):
    """-1, 0 or 1; 0 for NaN, as in torch"""
    return tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, 0.0)).to(x.dtype)
