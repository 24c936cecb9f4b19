"""Norm, verdict and update of one bucket as a single cooperative launch."""

from __future__ import annotations

from typing import Any

from . import occupancy, triton_norm
from .backends import KernelFailed, interpreting
from .clipping import IMPOSSIBLE, Terms, Verdict
from .cohorts import StepNumbers
from .hooks import warn
from .kernels.clipped import clipped_step
from .skips import Skips
from .triton_norm import judging_arguments

REFUSALS = "cooperative", "not supported"
"""What drivers say of a cooperative launch that they cannot make; nothing has been launched then."""


class Cooperative:
    """The cooperative launches of one bucket: whether there can be any, and how many programs they have."""

    def __init__(self) -> None:
        self.refusal: str | None = None
        """Why there can be none, once that was tried."""
        self.programs: dict[Any, int] = {}
        """The grid of each variant of the kernel."""

    def step(self, executor: Any, update: StepNumbers, terms: Terms, skips: Skips) -> Verdict | None:
        """Launch it for a bucket's ``triton_backend.Executor``. None if the driver refuses, or the kernel fails and no
        backend was asked for; RuntimeError if nothing else will do."""
        device, settings, tables = executor.bucket.device, executor.settings, executor.tables
        verdict = skips.verdict(device)
        known, variants = executor.variants(skips)
        chains, shared = executor.prepare(update, variants)
        slots, _, barrier = executor.norms.workspace(1)
        judging, constants, variant = judging_arguments(device, terms)
        tiles = tables.norm_tiles
        lanes, places = 0, None
        if settings.track is not None:
            tally = executor.tally
            lanes, tally.latest = tables.wide_block // tables.vector, tally.of_norm_tiles
            places = tally.latest.sums
        forms = executor.forms()
        variant = chains.used, variant, forms is tables.forms
        args = (
            tables.upload.device_copy, tiles.table, tiles.count, executor.rows.table, slots, barrier, verdict,
            *judging, known, variants, settings.seed, executor.limits(), places,
            tables.roles, forms, chains.h, chains.on_grad, chains.on_update, chains.averages,
        )  # fmt: skip
        constants = constants | shared | {
            "DRAWS": tables.draws, "NORM_BLOCK": tables.norm_block, "SLOTS": triton_norm.SLOTS,
            # As many warps as the norm kernel has: its sums are added in an order that depends on them.
            "BLOCK": tables.wide_block, "LANES": lanes, "num_warps": tables.tuning.norm_warps,
            "launch_cooperative_grid": True,
        }  # fmt: skip
        if tables.max_registers is not None:
            # Sums take some: with 80 for all, those of bfloat16 would go to memory. Up to 128 two programs fit.
            constants["maxnreg"] = tables.max_registers + (0 if places is None else 32)
        try:
            if variant not in self.programs:
                self.programs[variant] = _grid(executor, *args, **constants)
            executor.launch(clipped_step, variant, self.programs[variant], *args, **constants)
        except (RuntimeError, AssertionError) as error:
            cause = error.__cause__ or error
            refused = any(words in str(cause).lower() for words in REFUSALS)
            if not refused and not (isinstance(error, KernelFailed) and settings.backend is None):
                raise
            self.refusal = f"the driver refuses a cooperative launch ({cause})" if refused else str(error)
            if settings.launches == 1:
                raise RuntimeError(IMPOSSIBLE.format(self.refusal)) from cause
            if not refused:
                warn(f"{error}: norm and update take two launches on {device}")
            return None
        executor.finish(forms)
        return terms.left_to(verdict)


def _grid(executor: Any, *args: Any, **constants: Any) -> int:
    """As many programs as surely run at the same time."""
    if interpreting():
        return 1
    compiled = executor.launch.compiled(clipped_step, *args, **constants)
    return occupancy.largest_grid(compiled, executor.bucket.device, triton_norm.SLOTS, executor.tables.tuning.programs)
