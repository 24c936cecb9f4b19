"""The kernels. They import triton and nothing else: no torch, no fusedopt."""

from . import (
    address,
    arithmetic,
    clipped,
    means,
    norm,
    numbers,
    philox,
    rounding,
    rules,
    stages,
    step,
    tally,
    tracked,
    tuning,
    units,
)

__all__ = [
    "address", "arithmetic", "clipped", "means", "norm", "numbers", "philox", "rounding", "rules", "stages", "step",
    "tally", "tracked", "tuning", "units",
]  # fmt: skip
