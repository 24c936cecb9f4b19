"""The kernels. They import triton and nothing else: no torch, no fusedopt."""

from . import address, norm, rounding, rules, stages, step

__all__ = ["address", "norm", "rounding", "rules", "stages", "step"]
