"""The verdict on the device: norm kernels, one launch per bucket, and nobody waits."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from .clipping import Terms, Verdict
from .distributed import Reduction
from .kernels import norm
from .launch import Launches
from .skips import Skips
from .triton_tables import Tables

SLOTS = 1024
"""Partial sums of the norm per bucket, whatever the device: the order of addition must not depend on it."""


class Norm:
    """The norm of one bucket's gradients."""

    def __init__(self, tables: Tables, device: torch.device, launch: Launches):
        self.tables = tables
        self.device = device
        self.launch = launch
        self.slots: dict[int, Tensor] = {}
        self.counters: tuple[Tensor, Tensor] | None = None

    def workspace(self, buckets: int) -> tuple[Tensor, Tensor, Tensor]:
        """Slots, the ticket and the barrier. Zeroed once: every step writes the same slots, and leaves the others as
        the next one needs them."""
        if self.counters is None:
            self.counters = torch.zeros(2, 1, dtype=torch.int32, device=self.device).unbind()
        slots = self.slots.get(buckets)
        if slots is None:
            # Others stay: a CUDA graph may go on using them.
            slots = self.slots[buckets] = torch.zeros(buckets * SLOTS, dtype=torch.float64, device=self.device)
        return slots, *self.counters

    def wait(self) -> float:
        """The norm, waited for: only for buckets on several devices or backends."""
        slots, verdict = (torch.zeros(n, dtype=torch.float64, device=self.device) for n in (SLOTS, 4))
        self.add_squares(slots, 0, None, verdict, Terms())
        return math.sqrt(slots.sum().item())

    def add_squares(self, slots: Tensor, first_slot: int, ticket: Tensor | None, verdict: Tensor, terms: Terms) -> None:
        """Launch the norm kernel over this bucket; with a ticket its last program passes the verdict."""
        judging, constants, variant = judging_arguments(self.device, terms)
        tables, tiles, tuning = self.tables, self.tables.norm_tiles, self.tables.tuning
        self.launch(
            norm.sum_of_squares, (ticket is None, variant), min(tiles.count, SLOTS),
            tables.upload.device_copy, tiles.table, tiles.count, tables.roles.grad, slots, first_slot, slots.numel(),
            ticket, verdict, *judging, **constants,
            FIELDS=tables.fields, BLOCK=tables.norm_block, SLOTS=SLOTS,
            num_warps=tuning.norm_warps, enable_fp_fusion=False,
        )  # fmt: skip

    def judge(self, slots: Tensor, verdict: Tensor, terms: Terms) -> None:
        """Pass the verdict on what the slots hold, in a launch of its own."""
        judging, constants, variant = judging_arguments(self.device, terms)
        self.launch(
            norm.judge, variant, 1, slots, slots.numel(), verdict, *judging,
            **constants, SLOTS=SLOTS, enable_fp_fusion=False,
        )  # fmt: skip


def judge(executors: Sequence[Any], terms: Terms, skips: Skips, reduction: Reduction) -> Verdict:
    """Pass the verdict on the gradients of all buckets of one device."""
    verdict = skips.verdict(executors[0].bucket.device)
    if reduction.communicates and terms.joins_ranks:
        _judge_with_other_ranks(executors, terms, verdict, reduction)
    else:
        _judge_alone(executors, terms, verdict)
    return terms.left_to(verdict)


def foresee(executors: Sequence[Any], terms: Terms, verdict: Tensor, reduction: Reduction) -> None:
    """Go through the launches of ``judge`` that wait for no other rank, where ``launch`` leaves them to be compiled."""
    if reduction.communicates and terms.joins_ranks:
        _squares_by_spread(executors, terms, verdict, reduction.keys)
    else:
        _judge_alone(executors, terms, verdict)


def _judge_alone(executors: Sequence[Any], terms: Terms, verdict: Tensor) -> None:
    last = executors[-1].norms
    filled = [executor.norms for executor in executors if executor.tables.tiles.count] if terms.needs_norm else []
    slots, ticket, _ = last.workspace(max(len(filled), 1))
    for i, norms in enumerate(filled):
        norms.add_squares(slots, i * SLOTS, ticket if norms is filled[-1] else None, verdict, terms)
    if not filled:
        last.judge(slots, verdict, terms)


def _judge_with_other_ranks(executors: Sequence[Any], terms: Terms, verdict: Tensor, reduction: Reduction) -> None:
    """The sums of squares by spread, one all_reduce per group, then the verdict in a launch of its own."""
    device = executors[0].bucket.device
    squares = _squares_by_spread(executors, terms, verdict, reduction.keys)
    total = reduction.total(squares.to(reduction.device), terms.found_inf).to(device, non_blocking=True)
    if terms.found_inf is not None:
        terms = terms._replace(found_inf=total[1:])
    executors[-1].norms.judge(torch.nn.functional.pad(total[:1], (0, SLOTS - 1)), verdict, terms)


def _squares_by_spread(executors: Sequence[Any], terms: Terms, verdict: Tensor, keys: Sequence[Any]) -> Tensor:
    """This rank's sums of squares: float64 [keys]."""
    alike = [[executor for executor in executors if executor.bucket.spread == key] for key in keys]
    longest = max(map(len, alike)) if terms.needs_norm else 0
    if not longest:
        return torch.zeros(len(keys), dtype=torch.float64, device=executors[0].bucket.device)
    slots, *_ = executors[-1].norms.workspace(len(keys) * longest)
    for i, row in enumerate(alike):
        for k, executor in enumerate(row):
            if executor.tables.tiles.count:
                executor.norms.add_squares(slots, (i * longest + k) * SLOTS, None, verdict, terms)
    return slots.view(len(keys), -1).sum(1)


def judging_arguments(device: torch.device, terms: Terms) -> tuple[tuple, Mapping[str, bool], tuple]:
    """The kernels' last arguments, the constants that go with them, and which variant of a kernel they are."""
    scale, kind_of_scale = scaler_argument(terms.loss_scale, device)
    found_inf, kind_of_found_inf = scaler_argument(terms.found_inf, device)
    limits, constants = _of_settings(terms.clip, terms.skip_nonfinite)
    variant = terms.clip is not None, terms.skip_nonfinite, kind_of_scale, kind_of_found_inf
    return (*limits, scale, found_inf), constants, variant


@functools.lru_cache
def _of_settings(clip: tuple[float, float, float] | None, skip_nonfinite: bool) -> tuple[tuple, Mapping[str, bool]]:
    """What follows from the settings alone, mostly the same at every step."""
    return clip or (math.inf, 0.0, 1.0), MappingProxyType({"CLIP": clip is not None, "SKIP": skip_nonfinite})


def scaler_argument(number: Tensor | None, device: torch.device) -> tuple[Tensor | None, tuple | None]:
    """A number of a GradScaler for a kernel on that device, and which variant of the kernel takes it."""
    if number is None:
        return None, None
    # A scaler keeps its scale where the loss is, which may be another GPU.
    number = number.to(device, non_blocking=True)
    return number, (number.dtype, number.data_ptr() & 15 == 0)
