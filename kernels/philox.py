"""Random bits that depend on seed, step, role and the element's number only: Philox 4x32 with 7 rounds.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (2011), where 7 rounds pass BigCrush.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from triton.language.random import philox

ROUNDS = tl.constexpr(7)


class Draw(NamedTuple):
    seed: object
    step: object  # counted from 1
    first: object  # the number of the tensor's first eight elements among all eights of the optimizer


@triton.jit
def sixteen_bits(draw, start, ROLE: tl.constexpr, N: tl.constexpr):
    """uint32 [N] below 2^16 for the elements from ``start``, a multiple of 8, on: one draw serves eight."""
    eights = draw.first + start // 8 + tl.arange(0, N // 8)
    low, high = eights.to(tl.uint32), (eights >> 32).to(tl.uint32)
    a, b, c, d = philox(draw.seed, low, high, high * 0 + draw.step.to(tl.uint32), high * 0 + ROLE, ROUNDS)
    words = tl.join(tl.join(a, c), tl.join(b, d))
    return tl.reshape(tl.join(words & 0xFFFF, words >> 16), (N,))
