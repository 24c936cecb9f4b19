"""Sums of squares of what the update has in registers: of the gradient as it was read, of the step that the parameter
takes, and of the parameter behind it. Their roots are the norms of ``optimizer.metrics``.

Each thread adds in the dtype of arithmetic, and writes are float64: a program's sums go to places of their own, and
nobody adds those up before somebody asks for the norms. In float32 squares overflow above 1e19 and vanish below 1e-19.
"""

import triton
import triton.language as tl

SUMS = tl.constexpr(3)
"""Of gradient, update and parameter, in that order."""


@triton.jit
def nothing(LANES: tl.constexpr, COMPUTE: tl.constexpr):
    zeros = tl.zeros((LANES,), COMPUTE)
    return zeros, zeros, zeros


@triton.jit
def with_gradient(sums, g):
    """The sums with one span's gradient, which is zero where the span is masked; ``()``, nobody's sums, stay ``()``."""
    if len(sums) > 0:
        sums = with_squares(sums[0], g), sums[1], sums[2]
    return sums


@triton.jit
def with_step(sums, u, p, span):
    """The sums with the update and the parameter behind it."""
    if len(sums) > 0:
        LANES: tl.constexpr = sums[0].shape[0]
        if span.whole:
            # Only whole threads are masked.
            in_use = tl.arange(0, LANES) * (span.mask.shape[0] // LANES) < span.count
            u_squares = tl.where(in_use, with_squares(sums[1], u), sums[1])
            p_squares = tl.where(in_use, with_squares(sums[2], p), sums[2])
        else:
            u_squares = with_squares(sums[1], tl.where(span.mask, u, 0.0))
            p_squares = with_squares(sums[2], tl.where(span.mask, p, 0.0))
        sums = sums[0], u_squares, p_squares
    return sums


@triton.jit
def with_squares(sums, x):
    """The sums with the squares of each one's neighbours in x, those of one thread. Fused: one instruction instead of
    two, and one rounding (the interpreter rounds twice)."""
    if x.shape[0] == sums.shape[0]:
        return tl.fma(x, x, sums)
    else:
        a, b = tl.split(tl.reshape(x, (x.shape[0] // 2, 2)))
        return with_squares(with_squares(sums, a), b)


@triton.jit
def store_sums(sums, tally, row, loss_scale):
    """Store the sums at ``tally``. The update was summed up without its learning rate, the gradient with the scale of
    its loss."""
    lr = tl.load(row).to(tl.float64)
    scale = tl.full((), 1.0, tl.float64)
    if loss_scale is not None:
        scale = 1.0 / tl.load(loss_scale).to(tl.float64)
    tl.store(tally, tl.sum(sums[0]).to(tl.float64) * scale * scale)
    tl.store(tally + 1, tl.sum(sums[1]).to(tl.float64) * lr * lr)
    tl.store(tally + 2, tl.sum(sums[2]).to(tl.float64))
