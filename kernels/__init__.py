"""The kernels. They import triton and nothing else: no torch, no fusedopt."""

from . import address, means, norm, philox, rounding, rules, stages, step

__all__ = ["address", "means", "norm", "philox", "rounding", "rules", "stages", "step"]
