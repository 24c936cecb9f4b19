"""What one kernel updates: parameters of one device, one set of dtypes and one rule, each in its place."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import _get_scalar_dtype

from . import ema
from .backends import Backend
from .cohorts import Cohort, Scalar
from .distributed import Groups
from .flat import Space, is_dense
from .places import Change, Place, adopt_states, begin_states, count_aside, flatten, has_shared_state, terms, write
from .rule import Rule
from .storage import Storage, counts_steps, state_keys
from .survey import Entry, NotFusable

SMALL = 16384
"""Elements below which a CPU spends more on calling an operation than on the numbers."""

FEW, FEW_LISTED = 2, 8
"""Fewer small tensors than this are not worth gathering: where each takes several calls, where one call takes all."""


@dataclasses.dataclass(slots=True, eq=False)
class Member:
    """One parameter with a gradient."""

    owner: Tensor
    """The parameter as the optimizer holds it, the key of its state."""
    param: Tensor
    """What this rank updates: the owner, or its local part."""
    position: int
    """Its gradient's position among this step's gradients."""
    cohort: int
    place: Place
    first_draw: int
    """The number of its first eight elements among all eights of the optimizer: see philox.py."""


@dataclasses.dataclass(slots=True, eq=False)
class Bucket:
    """What one kernel can update: one device, one set of dtypes, one rule; over all groups."""

    rule: Rule
    device: torch.device
    dtype: torch.dtype
    grad_dtype: torch.dtype
    backend: Backend
    flat: bool
    """Whether all parameters lie in one flat buffer."""
    stored: Storage
    averages: tuple[str, ...]
    """Roles in the members' places that follow the new parameter, in the order of ``Update.averages``."""
    fused: bool
    """Whether torch's fused CPU kernel updates them."""
    listed: bool
    """Whether that kernel takes small parameters as a list, where they are; otherwise they are gathered."""
    spread: Groups
    """The process groups over which the elements are spread."""
    capturable: bool
    """Whether the device counts the steps. The host's cohorts are whole groups then, and their counts mean nothing."""
    cohorts: list[Cohort]
    members: list[Member]
    passing: bool = False
    """Whether other members are expected soon, so that the gradients of these are not worth gathering."""

    def __str__(self) -> str:
        flattened = sum(m.place.flattened is not None for m in self.members)
        gathered = sum(m.place.packed for m in self.members)
        elements = sum(m.param.numel() for m in self.members)
        placement = f"{flattened} flattened, {gathered} gathered" if flattened or gathered else "left in place"
        if self.spread:
            placement += f", parts of DTensors spread over {math.prod(group.size() for group in self.spread)} ranks"
        return (
            f"{self.rule.name} on {self.device}, {str(self.dtype).removeprefix('torch.')}: {len(self.members)} "
            f"parameters ({elements} elements, {placement}) with "
            f"{len(self.cohorts)} set{'s' * (len(self.cohorts) > 1)} of hyperparameters, "
            f"backend {self.backend} ({self.backend.reason})"
        )


def settle(optimizer: Any, key: tuple, entries: list[Entry], places: dict[Tensor, Place]) -> Bucket:
    """Give every parameter of a bucket its place, and its state the place's memory."""
    device, dtype, grad_dtype, rule, choice, stored, spread, capturable, _ = key
    distributed = spread is not None
    owners, params = [entry.owner for entry in entries], [entry.param for entry in entries]
    overlapping = sharing_memory(params)
    if overlapping and (choice.name == "triton" or any(id(p) in overlapping and not is_dense(p) for p in params)):
        raise NotFusable("parameters that share memory, or whose elements lie between each other's")
    if distributed and choice.name == "torch" and not all(map(is_dense, params)):
        raise NotFusable("distributed parameters with gaps in memory")
    # Blocks of quantized values, and random bits, go by tensor.
    joins = choice.name == "torch" and stored.plain
    irregular = [joins and not is_dense(p) for p in params]
    gathers = joins and device.type == "cpu" and not distributed
    small = [gathers and _is_small(entry, overlapping) for entry in entries]
    settings = optimizer._settings
    fused = stored.plain and rule.fuses(device, {dtype, grad_dtype, *stored.dtypes}) and not settings.cautious
    # Inside a kernel numbers are float32, outside they would be rounded to 16 bits.
    fused = fused and not (dtype.itemsize < 4 and settings.looks_inside)
    # Where parameters share memory, torch takes one with its averages before the next.
    fused = fused and not (overlapping and rule.averages)
    listed = fused and torch.get_num_threads() <= rule.list_threads
    # One call serves a list already; a list costs more than its calls only where it is longer.
    enough = sum(small) >= (FEW_LISTED if fused and rule.list_threads else FEW)
    enough = enough and (not listed or settings.flatten or settings.needs_norm)
    # What was gathered once stays so, or parameters that have no gradient at some steps would wander.
    packed = [a or (b and (enough or _is_packed(entry))) for a, b, entry in zip(irregular, small, entries)]

    counts = counts_steps(optimizer, stored)
    # As in torch, whose fused kernels want float32 counts on the device.
    fused_counts = capturable and any(entry.group.get("fused") for entry in entries)
    count_dtype = _get_scalar_dtype(fused_counts) if counts else None
    homes = [entry.place for entry in entries]
    homeless = [
        (index, entry, pack)
        for index, (entry, pack) in enumerate(zip(entries, packed))
        if not _has_home(entry, stored, rule, count_dtype, pack, capturable)
    ]
    if homeless:
        # Small ones first, and group by group, so that each cohort's lie side by side; within a group by shape, so
        # that gradients can be gathered by few calls.
        homeless.sort(key=lambda one: (not one[2], one[1].number, one[1].param.shape[1:] if one[2] else ()))
        space = Space([entry.param for _, entry, _ in homeless], sum(pack for *_, pack in homeless), capturable)
        for number, (index, (owner, *_, earlier, _), pack) in enumerate(homeless):
            owned = earlier is not None and earlier.flattened == owner.data_ptr()
            homes[index] = Place(space, number, pack, owned=owned, like=owner if distributed else None)
        places.update(zip(owners, homes))

    flattened = flatten(homes, params, settings.flatten and not distributed)
    cohorts: dict[tuple, Cohort] = {}
    members, writes, changes, unsettled = [], [], [], []
    beginners: dict[int, tuple[dict, dict[str, Scalar], list[tuple[Tensor, Tensor, Place]]]] = {}
    """By group."""
    agreed, keys = terms(rule, settings, capturable), tuple(state_keys(optimizer, rule, stored))
    for place, entry in zip(homes, entries):
        owner, p, position, number, group, taken, scalars, first_draw, state, _, settled = entry
        if capturable and not counts:
            writes += count_aside(optimizer, owner, place, stored, taken)
        key = number if capturable else (number, taken, scalars)
        if key not in cohorts:
            known = (0,) if capturable else (taken, tuple(map(Scalar.number, scalars)))
            cohorts[key] = Cohort(len(cohorts), group, *known)
        cohort = cohorts[key]
        if not settled or place.terms is None:
            unsettled.append(place)
            if state and keys:
                numbers = _numbers(taken, rule, scalars, count_dtype)
                fills, change = adopt_states(optimizer, owner, group, place, stored, numbers)
                writes += fills
                changes.append(change)
            elif keys:
                if number not in beginners:
                    beginners[number] = group, _numbers(taken, rule, scalars, count_dtype), []
                beginners[number][2].append((owner, p, place))
        if settings.ema_decay is not None:
            fills, new = ema.adopt(optimizer._ema, owner, place)
            writes += fills
            changes.append(Change(optimizer._ema, new))
        member = Member(owner, p, position, cohort.number, place, first_draw)
        cohort.members.append(member)
        members.append(member)
    for group, numbers, some in beginners.values():
        fills, begun = begin_states(optimizer, group, some, stored, numbers)
        writes += fills
        changes += begun
    write(optimizer, writes)
    for change in changes:
        change.make()
    for place in unsettled:
        place.settle(agreed, keys)
    averages = rule.averages if settings.ema_decay is None else (*rule.averages, ema.ROLE)
    return Bucket(
        rule, device, dtype, grad_dtype, choice, flattened, stored, averages, fused, listed, spread or (),
        capturable, list(cohorts.values()), members,
    )  # fmt: skip


def _is_small(entry: Entry, overlapping: set[int]) -> bool:
    """Whether the parameter is worth gathering, and may be."""
    if entry.param.numel() >= SMALL or id(entry.param) in overlapping:
        return False
    return not entry.state or (entry.settled and entry.place.packed) or not has_shared_state(entry.state, entry.place)


def _is_packed(entry: Entry) -> bool:
    return entry.place is not None and entry.place.packed


def _has_home(
    entry: Entry, stored: Storage, rule: Rule, count_dtype: torch.dtype | None, packed: bool, capturable: bool
) -> bool:
    """Whether the parameter's place will do."""
    if entry.place is None or not entry.place.packs(entry.param, packed):
        return False
    if entry.settled:
        return True
    beside = _numbers(entry.taken, rule, entry.scalars, count_dtype)
    return entry.place.fits(entry.param, {**stored.parts, **beside}, capturable)


def _numbers(
    taken: int | Tensor, rule: Rule, scalars: Sequence[Scalar], count_dtype: torch.dtype | None
) -> dict[str, Scalar]:
    """What stands beside a parameter's states: its step count, if there is one, its rule's scalars."""
    taken = taken if isinstance(taken, Tensor) else float(taken)
    step = {} if count_dtype is None else {"step": Scalar(taken, count_dtype)}
    return {**step, **dict(zip(rule.scalars, scalars))} if scalars else step


def sharing_memory(params: Sequence[Tensor]) -> set[int]:
    """The ids of parameters whose memory begins inside another one's, and of those others."""
    starts = map(Tensor.data_ptr, params)
    ends = sorted((start, start + _extent(p), id(p)) for start, p in zip(starts, params) if p.numel())
    found: set[int] = set()
    reach, owner = 0, 0
    for start, end, number in ends:
        if start < reach:
            found |= {owner, number}
        if end > reach:
            reach, owner = end, number
    return found


def _extent(p: Tensor) -> int:
    """Bytes from its first element to the end of its last."""
    if p.is_contiguous():
        return p.nbytes
    return (sum((size - 1) * stride for size, stride in zip(p.size(), p.stride())) + 1) * p.element_size()
