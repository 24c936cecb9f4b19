"""One norm over all ranks, and means over whole parameters: which sums of squares are added up over which ranks.

A parameter's elements may be spread over some dimensions of a device mesh and be replicated over the others. Parameters
spread over the same process groups share one local sum of squares; it is added up over each of those groups, so
that every element counts once, however many replicas there are: no group for DistributedDataParallel, one for FSDP,
hybrid FSDP and tensor parallelism, two for FSDP with tensor parallelism.

Which sums there are follows from the parameters, not from this step's gradients: every rank takes part in every
all_reduce, also one that has no gradient at all. The same holds for means over whole parameters.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from .hooks import warn
from .shards import any_distributed, is_distributed, is_piece, refuse_partial

ProcessGroups = tuple[Any, ...]
"""The process groups over which a tensor's elements are spread, in the order of its mesh's dimensions."""

AllReduce = tuple[Any, Tensor | None]
"""A process group, and which rows it adds up: see ``all_reduces_over``."""


class Reduction:
    """What makes sums over this rank's gradients into sums over all.

    Args:
        params: all parameters of the optimizer.
        clip_group: the setting.

    Raises:
        RuntimeError: for parameters that are sums still to be taken, and for a ``clip_group`` that cannot be meant.
    """

    def __init__(self, params: Sequence[Tensor], clip_group: Any):
        self._spread: dict[Any, ProcessGroups] = {}
        distributed = [p for p in params if is_distributed(p)] if any_distributed(params) else []
        meshes = list({id(p.device_mesh): p.device_mesh for p in distributed}.values())
        self.keys: list[ProcessGroups] = list(dict.fromkeys(map(self.spread, params)))
        """The different spreads; none for what lies on this rank alone, or on every rank."""
        self.clip_groups = _groups_of(clip_group)
        for group in self.clip_groups:
            _check_disjoint(group, meshes, clip_group)
        self.device = _device(params, meshes, self.clip_groups)
        # Behind the sums of squares stands found_inf, which all groups add up.
        self.all_reduces = all_reduces_over([*self.keys, tuple(chain.from_iterable(self.keys))], self.device)
        self.flat_parameter = not self.clip_groups and any(map(is_piece, params))

    @property
    def communicates(self) -> bool:
        return bool(self.all_reduces or self.clip_groups)

    def check(self) -> None:
        """Refuse to take a part of the norm for the whole."""
        if self.flat_parameter:
            raise RuntimeError(
                "max_grad_norm, skip_nonfinite, track and clip_grad_norm_() would take this rank's part of the "
                "gradients for the whole: the parameters are shards of FullyShardedDataParallel. Give "
                "clip_group='world' (with hybrid sharding, the process group over which one copy of the model is "
                "spread), or, to clip, call model.clip_grad_norm_() before step() instead"
            )

    def spread(self, p: Any) -> ProcessGroups:
        """The groups over which a DTensor's elements are spread; none for other tensors."""
        if not is_distributed(p):
            return ()
        mesh, placements = p._spec.mesh, p._spec.placements
        found = self._spread.get((mesh, placements))
        if found is None:
            refuse_partial(p)
            spread = (d for d, placement in enumerate(placements) if not placement.is_replicate() and mesh.size(d) > 1)
            found = self._spread[mesh, placements] = tuple(map(mesh.get_group, spread))
        return found

    def total(self, squares: Tensor, found_inf: Tensor | None) -> Tensor:
        """[sum of squares over all ranks, not 0 if any of them found an inf]. Nobody waits for a GPU.

        Args:
            squares: float64 on ``device``, this rank's sum for each of ``keys``.
            found_inf: 1-element tensor of a GradScaler, or None.
        """
        found = squares.new_zeros(1) if found_inf is None else found_inf.to(squares, non_blocking=True).reshape(1)
        sums = torch.cat([squares, found])
        add_over_ranks(sums, self.all_reduces)
        total = torch.stack([sums[:-1].sum(), sums[-1]])
        for group in self.clip_groups:
            dist.all_reduce(total, group=group)
        return total


class MeansOverRanks:
    """Means over whole parameters, of which ranks hold parts: one all_reduce per process group joins all of them.

    There is a row for each parameter that is spread over ranks, in the optimizer's order, whether it has a gradient or
    not: every rank takes part at every step.

    Args:
        params: all parameters of the optimizer.
        reduction: over which groups they are spread.
        count: how many means each of them needs.
    """

    def __init__(self, params: Sequence[Tensor], reduction: Reduction, count: int):
        spreads = {id(p): spread for p in params if (spread := reduction.spread(p))}
        self.rows = {key: row for row, key in enumerate(spreads)}
        self.known: WeakKeyDictionary[Any, Tensor] = WeakKeyDictionary()
        """The rows of each executor."""
        self.shape = len(spreads), count
        self.device = reduction.device
        self.all_reduces = all_reduces_over(list(spreads.values()), self.device)

    def means(self, executors: Sequence[Any], *step: Any) -> dict[int, Tensor]:
        """The means for the executors of buckets that are spread, by their ids: float64 [members, terms].

        Args:
            executors: those that update something here at this step.
            step: what they are told of it.
        """
        spread = [executor for executor in executors if executor.bucket.spread]
        sums = torch.zeros(self.shape, dtype=torch.float64, device=self.device)
        for executor in spread:
            shares = executor.shares_of_means(*step)
            sums[self._rows_of(executor), : shares.shape[1]] = shares.to(self.device, non_blocking=True)
        add_over_ranks(sums, self.all_reduces)
        return {id(e): sums[self._rows_of(e)].to(e.bucket.device, non_blocking=True) for e in spread}

    def _rows_of(self, executor: Any) -> Tensor:
        if executor not in self.known:
            rows = [self.rows[id(m.owner)] for m in executor.ordered]
            self.known[executor] = torch.tensor(rows, device=self.device)
        return self.known[executor]


def all_reduces_over(spreads: Sequence[ProcessGroups], device: torch.device) -> list[AllReduce]:
    """How rows that are spread over these groups are added up: each group, and which rows it adds, None for all."""
    found = []
    for group in dict.fromkeys(chain.from_iterable(spreads)):
        rows = [row for row, spread in enumerate(spreads) if group in spread]
        found.append((group, None if len(rows) == len(spreads) else torch.tensor(rows, device=device)))
    return found


def add_over_ranks(sums: Tensor, all_reduces: Iterable[AllReduce]) -> None:
    """Add this rank's rows of ``sums`` up over process groups, one group after the other, in place."""
    for group, rows in all_reduces:
        part = sums if rows is None else sums[rows]
        dist.all_reduce(part, group=group)
        if rows is not None:
            sums[rows] = part


def warn_of_replaced_parameters() -> None:
    """At a first step at which nothing has a gradient."""
    if dist.is_available() and dist.is_initialized():
        warn(
            "no parameter of this optimizer has a gradient at its first step. Was it built before fully_shard(), "
            "which replaces a model's parameters? Build it afterwards, or it will never change anything."
        )


def _groups_of(clip_group: Any) -> list[Any]:
    """The process groups that a ``clip_group`` stands for."""
    if clip_group is None:
        return []
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(
            f"clip_group={clip_group!r} needs a process group: call torch.distributed.init_process_group() first, "
            "or leave it out"
        )
    if clip_group == "world":
        return [dist.group.WORLD]
    if isinstance(clip_group, dist.ProcessGroup):
        return [clip_group]
    return [clip_group.get_group(d) for d in range(clip_group.ndim) if clip_group.size(d) > 1]


def _check_disjoint(group: Any, meshes: Iterable[Any], clip_group: Any) -> None:
    """Ranks that a mesh already connects would be counted several times."""
    ranks = set(dist.get_process_group_ranks(group))
    for mesh in meshes:
        for d in range(mesh.ndim):
            if len(ranks.intersection(dist.get_process_group_ranks(mesh.get_group(d)))) > 1:
                raise RuntimeError(
                    f"clip_group={clip_group!r} connects ranks over which the parameters are distributed already "
                    f"({mesh}): their norm needs no clip_group; give one only for ranks with other parameters, "
                    "such as pipeline stages"
                )


def _device(params: Sequence[Tensor], meshes: Sequence[Any], clip_groups: Sequence[Any]) -> torch.device:
    """Where the groups can communicate: with CPU offload not where the gradients are."""
    if not meshes and not clip_groups:
        return params[0].device if params else torch.device("cpu")
    kind = next((mesh.device_type for mesh in meshes), params[0].device.type if params else "cpu")
    for group in clip_groups:
        possible = [device.type for device in group._device_types]
        kind = kind if kind in possible else possible[0]
    return torch.device(kind) if kind == "cpu" else torch.device(kind, torch.get_device_module(kind).current_device())
