"""The kernels. They import triton and nothing else: no torch, no fusedopt."""

from . import address, clipped, means, norm, philox, rounding, rules, stages, step, tally, tracked, tuning

__all__ = [
    "address", "clipped", "means", "norm", "philox", "rounding", "rules", "stages", "step", "tally", "tracked",
    "tuning",
]  # fmt: skip
