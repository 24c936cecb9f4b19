"""How a computed value becomes the stored dtype: ``round(x, dtype) -> x``."""

import triton
import triton.language as tl


@triton.jit
def nearest(x, dtype: tl.constexpr):
    """to the nearest, ties to even"""
    return x.to(dtype)
