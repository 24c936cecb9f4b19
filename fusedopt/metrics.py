"""The norms of what a step did, from sums of squares that the update takes while it has the numbers at hand.

    grad_norm = ||g||     update_norm = ||theta_t - theta_(t-1)||     param_norm = ||theta_t||

Executors keep their sums to themselves. They are added up when somebody asks, but for distributed parameters, whose
ranks must add up together: there in the step, which every rank takes, so that a single rank may ask.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .devices import sum_dtype
from .distributed import Reduction, add_over_ranks, all_reduces_over
from .shards import local

SUMS = 3
"""Columns: the squares of the gradient, of the update, of the parameter."""


class Metrics(NamedTuple):
    """Norms of the latest step: float32, or float64 where a parameter is; new tensors on the parameters' device.

    Shapes: 0-dim with ``track="total"``, one norm over all parameters of all groups; with ``track="parameters"`` one
    number for each parameter, in the order of the groups. Where a parameter had no gradient, or the step was skipped,
    it was not updated: an update of 0; without gradient, a gradient of 0.
    """

    grad_norm: Tensor
    """Of the gradient, without loss scale and before clipping."""
    update_norm: Tensor
    """Of new minus old parameter, weight decay included, before the new one is rounded to its dtype."""
    param_norm: Tensor
    """Of the parameter after the step; where it had no gradient, as it is when this is asked for."""


class Tracker:
    """The sums of one step after the other, for one plan."""

    def __init__(self, params: Sequence[Tensor], executors: Sequence[Any], reduction: Reduction):
        self.params = params
        self.executors = executors
        self.reduction = reduction
        updated = {position for executor in executors for position in executor.tally.positions}
        self.others = [k for k in range(len(params)) if k not in updated]
        devices = [executor.bucket.device for executor in executors] or [local(p).device for p in params]
        self.device = next(iter(devices), torch.device("cpu"))
        dtypes = {p.dtype for p in params} | {executor.bucket.grad_dtype for executor in executors}
        self.dtype = torch.float64 if torch.float64 in dtypes else torch.float32
        self.rows = [torch.tensor(executor.tally.positions, device=self.device) for executor in executors]
        self.added: tuple[Tensor, Tensor] | None = None
        """By parameter and in all, over all ranks: in memory that stays, since a CUDA graph writes there too."""
        self.all_reduces = all_reduces_over(list(map(reduction.spread, params)), reduction.device)

    def finish(self) -> None:
        """The end of a step: add up over ranks."""
        if self.reduction.communicates:
            found = self._over_ranks(self._here())
            if self.added is None:
                with torch.inference_mode(False):  # or steps outside it could not write there
                    self.added = tuple(x.clone() for x in found)
            else:
                for old, new in zip(self.added, found):
                    old.copy_(new)

    def metrics(self, track: str) -> Metrics:
        by_parameter, total = self.added or (None, None)
        if by_parameter is None:
            by_parameter = self._here()
            total = by_parameter.sum(0)
        squares = total if track == "total" else by_parameter
        return Metrics(*squares.sqrt().to(self.dtype).unbind(-1))

    @torch.no_grad()
    def _here(self) -> Tensor:
        """[parameters, SUMS] on this rank, float64 where the device has it."""
        found = torch.zeros(len(self.params), SUMS, dtype=sum_dtype(self.device), device=self.device)
        for rows, executor in zip(self.rows, self.executors):
            found[rows] = executor.tally.sums().to(found, non_blocking=True)
        for k in self.others:
            p = local(self.params[k]).detach()
            norm = torch.linalg.vector_norm(p, dtype=sum_dtype(p.device))
            found[k, 2] = norm.square().to(found, non_blocking=True)
        return found

    def _over_ranks(self, here: Tensor) -> tuple[Tensor, Tensor]:
        found = here.to(self.reduction.device)
        add_over_ranks(found, self.all_reduces)
        total = found.sum(0)
        # Of other ranks' parameters only the total concerns this one.
        for group in self.reduction.clip_groups:
            dist.all_reduce(total, group=group)
        return found.to(self.device, non_blocking=True), total.to(self.device, non_blocking=True)
