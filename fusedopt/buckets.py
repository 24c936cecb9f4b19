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
from .adoption import adopt, has_shared_state, numbers_of
from .backends import Backend
from .cohorts import Cohort, Scalar
from .devices import has_addresses
from .distributed import ProcessGroups
from .flat import Space, is_dense
from .places import Place, flatten
from .rule import Rule
from .settings import Settings
from .storage import Storage, counts_steps
from .survey import Entry, Key
from .torch_step import NotFusable

SMALL = 16384
"""Elements below which a CPU spends more on calling an operation than on the numbers."""

FEW, FEW_LISTED = 2, 8
"""Fewer small tensors than this are not worth gathering: where each takes several calls, and where one call takes a
list of them."""


@dataclasses.dataclass(slots=True, eq=False)
class Member:
    """One parameter with a gradient, as part of a bucket."""

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
    spread: ProcessGroups
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


def make_bucket(optimizer: Any, key: Key, entries: list[Entry], places: dict[Tensor, Place]) -> Bucket:
    """Give every parameter its place, and its state the place's memory."""
    settings, params = optimizer._settings, [entry.param for entry in entries]
    overlapping = sharing_memory(params)
    _refuse_layouts(key, params, overlapping)
    fused = _is_fused(key, settings, overlapping)
    count_dtype = None
    if counts_steps(optimizer, key.stored):
        # As in torch, whose fused kernels want float32 counts on the device.
        count_dtype = _get_scalar_dtype(key.capturable and any(entry.group.get("fused") for entry in entries))

    lists = fused and _takes_lists(key.rule, entries)
    packed = _packed(key, settings, entries, overlapping, lists)
    homes = _homes(key, entries, packed, count_dtype)
    places.update(zip([entry.owner for entry in entries], homes))
    flattens = settings.flatten and key.spread is None and has_addresses(key.device)
    flattened = flatten(homes, params, flattens)
    adopt(optimizer, key, entries, homes, count_dtype)

    cohorts, members = _grouped(key, entries, homes)
    averages = key.rule.averages if settings.ema_decay is None else (*key.rule.averages, ema.ROLE)
    return Bucket(
        key.rule, key.device, key.dtype, key.grad_dtype, key.backend, flattened, key.stored, averages, fused,
        _is_listed(key, lists), key.spread or (), key.capturable, cohorts, members,
    )  # fmt: skip


def _refuse_layouts(key: Key, params: Sequence[Tensor], overlapping: set[int]) -> None:
    """Raise NotFusable for parameters that lie in memory as we cannot take them."""
    in_torch = key.backend.name == "torch"
    if overlapping and (not in_torch or any(id(p) in overlapping and not is_dense(p) for p in params)):
        raise NotFusable(
            "parameters that share memory, or whose elements lie between each other's", "give each memory of its own"
        )
    if key.spread is not None and in_torch and not all(map(is_dense, params)):
        raise NotFusable("distributed parameters with gaps in memory")


def _is_fused(key: Key, settings: Settings, overlapping: set[int]) -> bool:
    """Whether torch's fused CPU kernel updates the bucket."""
    dtypes = {key.dtype, key.grad_dtype, *key.stored.dtypes}
    if not key.stored.plain or settings.cautious or not key.rule.fuses(key.device, dtypes):
        return False
    # Sums over parameters of which ranks hold parts.
    if key.rule.takes_sizes and key.spread is not None:
        return False
    # Inside a kernel numbers are float32, outside they would be rounded to 16 bits.
    if key.dtype.itemsize < 4 and settings.looks_inside:
        return False
    # Where parameters share memory, torch takes one with its averages before the next.
    return not (overlapping and key.rule.averages)


def _takes_lists(rule: Rule, entries: Sequence[Entry]) -> bool:
    """Whether one call of that kernel serves a list of these parameters."""
    groups = {entry.group_number: entry.group for entry in entries}.values()
    return rule.list_threads > 0 and (rule.lists is None or all(map(rule.lists, groups)))


def _is_listed(key: Key, lists: bool) -> bool:
    """Whether that is better than to gather small ones."""
    return lists and torch.get_num_threads() <= key.rule.list_threads


def _packed(key: Key, settings: Settings, entries: Sequence[Entry], overlapping: set[int], lists: bool) -> list[bool]:
    """Which parameters' states, and copies of them, lie side by side without gaps."""
    # Blocks of quantized values, and random bits, go by tensor.
    if key.backend.name != "torch" or not key.stored.plain:
        return [False] * len(entries)
    gathers = key.device.type == "cpu" and key.spread is None
    small = [gathers and _is_small(entry, overlapping) for entry in entries]
    # Where one call serves a list of tensors, gathering pays for long lists only.
    enough = sum(small) >= (FEW_LISTED if lists else FEW)
    enough = enough and (not _is_listed(key, lists) or settings.flatten or settings.needs_norm)
    # What was gathered once stays so, or parameters that have no gradient at some steps would wander.
    return [
        not is_dense(entry.param) or (is_small and (enough or _is_packed(entry)))
        for entry, is_small in zip(entries, small)
    ]


def _is_small(entry: Entry, overlapping: set[int]) -> bool:
    """Whether the parameter is worth gathering, and may be."""
    if entry.param.numel() >= SMALL or id(entry.param) in overlapping:
        return False
    return not entry.state or (entry.settled and entry.place.packed) or not has_shared_state(entry.state, entry.place)


def _is_packed(entry: Entry) -> bool:
    return entry.place is not None and entry.place.packed


def _homes(key: Key, entries: Sequence[Entry], packed: Sequence[bool], count_dtype: torch.dtype | None) -> list[Place]:
    """The place of each parameter: the one that it has, or one in a new space."""
    homes = [entry.place for entry in entries]
    homeless = [
        (index, entry, pack)
        for index, (entry, pack) in enumerate(zip(entries, packed))
        if not _has_home(key, entry, pack, count_dtype)
    ]
    if not homeless:
        return homes
    # Small ones first, and group by group, so that each cohort's lie side by side; within a group by shape, so
    # that gradients can be gathered by few calls.
    homeless.sort(key=lambda one: (not one[2], one[1].group_number, one[1].param.shape[1:] if one[2] else ()))
    for earlier in {entry.place.space for _, entry, _ in homeless if entry.place is not None}:
        earlier.free_later()
    space = Space([entry.param for _, entry, _ in homeless], sum(pack for *_, pack in homeless), key.capturable)
    for number, (index, entry, pack) in enumerate(homeless):
        owned = entry.place is not None and entry.place.flattened == entry.owner.data_ptr()
        like = None if key.spread is None else entry.owner
        homes[index] = Place(space, number, pack, owned=owned, like=like)
    return homes


def _has_home(key: Key, entry: Entry, packed: bool, count_dtype: torch.dtype | None) -> bool:
    """Whether the parameter's place will do."""
    if entry.place is None or not entry.place.packs(entry.param, packed):
        return False
    if entry.settled:
        return True
    parts = {**key.stored.parts, **numbers_of(entry, key.rule, count_dtype)}
    return entry.place.fits(entry.param, parts, key.capturable)


def _grouped(key: Key, entries: Sequence[Entry], homes: Sequence[Place]) -> tuple[list[Cohort], list[Member]]:
    """The parameters as members of a bucket, and the cohorts that they form."""
    cohorts: dict[Any, Cohort] = {}
    members = []
    for place, entry in zip(homes, entries):
        numbers = entry.group_number if key.capturable else (entry.group_number, entry.taken, entry.scalars)
        if numbers not in cohorts:
            known = (0,) if key.capturable else (entry.taken, tuple(map(Scalar.number, entry.scalars)))
            cohorts[numbers] = Cohort(len(cohorts), entry.group, *known)
        cohort = cohorts[numbers]
        member = Member(entry.owner, entry.param, entry.position, cohort.number, place, entry.first_draw)
        cohort.members.append(member)
        members.append(member)
    return list(cohorts.values()), members


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
