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
def added(sums, g, u, p, span):
    """The sums with one span's squares; ``()``, nobody's sums, stay ``()``."""
    if len(sums) > 0:
        LANES: tl.constexpr = sums[0].shape[0]
        if span.whole:
            # Only whole threads are masked, and the gradient that these read is zero.
            in_use = tl.arange(0, LANES) * (span.mask.shape[0] // LANES) < span.count
            u_squares = tl.where(in_use, squares(u, LANES), 0.0)
            p_squares = tl.where(in_use, squares(p, LANES), 0.0)
            sums = sums[0] + squares(g, LANES), sums[1] + u_squares, sums[2] + p_squares
        else:
            u = tl.where(span.mask, u, 0.0)
            p = tl.where(span.mask, p, 0.0)
            sums = sums[0] + squares(g, LANES), sums[1] + squares(u, LANES), sums[2] + squares(p, LANES)
    return sums


@triton.jit
def squares(x, LANES: tl.constexpr):
    """Sums over neighbours, those of one thread."""
    return tl.sum(tl.reshape(x * x, (LANES, x.shape[0] // LANES)), 1)


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
