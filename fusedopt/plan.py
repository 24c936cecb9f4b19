"""Which tensors one step reads and writes, worked out once and checked again at every step.

``optimizer.state[p]`` is the truth, as in torch.optim: what somebody loaded or put there is taken over
when the plan is built, and a plan holds only as long as parameters, gradients' layouts and states are
the ones that it was built from.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from itertools import chain, compress
from operator import attrgetter, is_, itemgetter
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import _get_scalar_dtype

from . import ema
from .backends import Backend
from .cohorts import Cohort, Scalar
from .distributed import Groups, Reduction
from .flat import Space, is_dense
from .places import Place, adopt_states, flatten, has_shared_state, write
from .rule import Rule
from .shards import Shards, is_distributed, local
from .storage import Storage, counts_steps, state_keys
from .survey import Entry, NotFusable, survey

SMALL = 16384
"""Elements below which a CPU spends more on calling an operation than on the numbers."""

FEW, FEW_LISTED = 2, 8
"""Fewer small tensors than this are not worth gathering: where each takes several calls, where one call takes all."""


get_dtype = attrgetter("dtype")
get_params = itemgetter("params")


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
    cohorts: list[Cohort]
    members: list[Member]


class Plan:
    """The buckets of one step, and what must stay as it is for them to be right."""

    def __init__(self, optimizer: Any, places: dict[Tensor, Place], grads: list[Tensor | None]):
        groups = optimizer.param_groups
        self.params = [p for group in groups for p in group["params"]]
        self.group_sizes = [len(group["params"]) for group in groups]
        rules = [optimizer.rule(group) for group in groups]
        self.present = [g is not None for g in grads]
        self.settings = optimizer._settings.layout

        self.reduction = Reduction(self.params, optimizer._settings.clip_group)
        if optimizer._settings.needs_norm:
            self.reduction.check()
        newcomers = survey(optimizer, rules, grads, self.reduction)
        for stale in set(places).difference(self.params):
            del places[stale]
        for stale in set(optimizer._ema).difference(self.params):
            del optimizer._ema[stale]
        self.buckets = [_settle(optimizer, key, entries, places) for key, entries in newcomers.items()]

        members = [member for bucket in self.buckets for member in bucket.members]
        self.active = list(map(local, compress(self.params, self.present)))
        self.grad_dtypes = list(map(get_dtype, compress(grads, self.present)))
        self.sizes = list(map(Tensor.numel, self.active))
        self.addresses = list(map(Tensor.data_ptr, self.active))
        self.strides = list(map(Tensor.stride, self.active))
        self.spaces = list({id(m.place.space): m.place.space for m in members}.values())
        self.steps = [space.numbers["step"] for space in self.spaces if "step" in space.numbers]
        self.stepped = [_stepped(space, members) for space in self.spaces if "step" in space.numbers]
        self.numbers = [numbers for space in self.spaces for numbers in space.numbers.values()]
        self.has_scalars = any(bucket.rule.scalars for bucket in self.buckets)
        self.identities = _identities(optimizer, self.params)
        self.views = [_views(optimizer, b) for b in self.buckets if state_keys(optimizer, b.rule, b.stored)]
        owners = [m.owner for m in members if is_distributed(m.owner)]
        states = (value for _, views in self.views for value in views if is_distributed(value))
        self.shards = Shards(owners, states) if owners else None
        self.note_steps()

    def note_steps(self) -> None:
        self.values = [numbers.tolist() for numbers in self.numbers]

    def holds(self, optimizer: Any, params: list[Tensor], grads: list[Tensor | None]) -> bool:
        """Whether the same plan serves this step. Runs at every step: about 0.3 us per parameter.

        Each check is one pass in C over cached lists. What they leave out is noticed otherwise: gradients of
        other shapes but equal size, and sparse ones, where gradients are taken; a parameter of another dtype by
        its gradient's.
        """
        if [g is not None for g in grads] != self.present:
            return False
        active = self.active
        active_grads = grads if len(active) == len(grads) else list(compress(grads, self.present))
        return (
            optimizer._settings.layout == self.settings
            and _same(_identities(optimizer, params), self.identities)
            and list(map(len, map(get_params, optimizer.param_groups))) == self.group_sizes
            and list(map(Tensor.data_ptr, active)) == self.addresses
            and list(map(Tensor.stride, active)) == self.strides
            and list(map(get_dtype, active_grads)) == self.grad_dtypes
            and list(map(Tensor.numel, active_grads)) == self.sizes
            and self._states_hold()
            and (self.shards is None or self.shards.hold())
            and self.values == [numbers.tolist() for numbers in self.numbers]
        )

    def _states_hold(self) -> bool:
        """Whether every state is the view that it was, in the memory where it was."""
        try:
            if not all(all(map(is_, read(), views)) for read, views in self.views):
                return False
        except KeyError:  # a state was deleted
            return False
        return self.uses == [space.uses() for space in self.spaces]

    def note_uses(self) -> None:
        """Remember how often the spaces' buffers are in use, now that the executors have their views of them."""
        self.uses = [space.uses() for space in self.spaces]

    def advance(self, optimizer: Any, by: int) -> None:
        """Count steps that were taken, or take back what turned out to be skipped: of a rule with scalars the latest
        step at most."""
        if not by:
            return
        for bucket in self.buckets:
            for cohort in bucket.cohorts:
                cohort.turn(optimizer, bucket.rule, by)
        for steps, stepped in zip(self.steps, self.stepped):
            steps.add_(stepped, alpha=by)
        self.note_steps()


def _views(optimizer: Any, bucket: Bucket) -> tuple[Callable[[], Iterable[Tensor]], list[Tensor]]:
    """How to read all states of a bucket's parameters, and which they are now."""
    keys = state_keys(optimizer, bucket.rule, bucket.stored)
    dicts = [optimizer.state[m.owner] for m in bucket.members]
    get = itemgetter(*keys)

    def read() -> Iterable[Tensor]:
        return map(get, dicts) if len(keys) == 1 else chain.from_iterable(map(get, dicts))

    return read, list(read())


def _identities(optimizer: Any, params: list[Tensor]) -> list[Any]:
    """Objects that must stay the same ones: groups and what they ask for, parameters, their states."""
    groups = optimizer.param_groups
    differentiable = [group.get("differentiable") for group in groups]
    return [*groups, *map(optimizer.rule, groups), *differentiable, *params, *optimizer.state.values()]


def _same(a: list[Any], b: list[Any]) -> bool:
    return len(a) == len(b) and all(map(is_, a, b))


def _stepped(space: Space, members: list[Member]) -> Tensor:
    """1 for each of the space's tensors that takes this step, else 0."""
    stepped = torch.zeros_like(space.numbers["step"])
    stepped[[m.place.index for m in members if m.place.space is space]] = 1
    return stepped


def _settle(optimizer: Any, key: tuple, entries: list[Entry], places: dict[Tensor, Place]) -> Bucket:
    """Give every parameter of a bucket its place, and its state the place's memory."""
    device, dtype, grad_dtype, rule, choice, stored, spread, _ = key
    distributed = spread is not None
    owners, params = [entry.owner for entry in entries], [entry.param for entry in entries]
    overlapping = _overlapping(params)
    if overlapping and (choice.name == "triton" or any(id(p) in overlapping and not is_dense(p) for p in params)):
        raise NotFusable("parameters that share memory, or whose elements lie between each other's")
    if distributed and choice.name == "torch" and not all(map(is_dense, params)):
        raise NotFusable("distributed parameters with gaps in memory")
    # Blocks of quantized values, and random bits, go by tensor.
    joins = choice.name == "torch" and stored.plain
    irregular = [joins and not is_dense(p) for p in params]
    gathers = joins and device.type == "cpu" and not distributed
    small = [
        gathers and p.numel() < SMALL and id(p) not in overlapping and not has_shared_state(optimizer, p, places.get(p))
        for p in params
    ]
    settings = optimizer._settings
    fused = stored.plain and rule.fuses(device, {dtype, grad_dtype, *stored.dtypes}) and not settings.cautious
    listed = fused and torch.get_num_threads() <= rule.list_threads
    # One call serves a list already; a list costs more than its calls only where it is longer.
    enough = sum(small) >= (FEW_LISTED if fused and rule.list_threads else FEW)
    enough = enough and (not listed or settings.flatten or settings.needs_norm)
    # What was gathered once stays so, or parameters that have no gradient at some steps would wander.
    packed = [a or (b and (enough or (p in places and places[p].packed))) for a, b, p in zip(irregular, small, owners)]

    counts = counts_steps(optimizer, stored)
    numbers = [_numbers(entry, rule, counts) for entry in entries]
    homeless = [
        (entry, pack)
        for entry, beside, pack in zip(entries, numbers, packed)
        if entry.owner not in places or not places[entry.owner].fits(entry.param, stored.parts, beside, pack)
    ]
    if homeless:
        # Small ones first, and group by group, so that each cohort's lie side by side; within a group by shape, so
        # that gradients can be gathered by few calls.
        homeless.sort(key=lambda pair: (not pair[1], pair[0].number, pair[0].param.shape[1:] if pair[1] else ()))
        space = Space([entry.param for entry, _ in homeless], packed=sum(pack for _, pack in homeless))
        for index, (entry, pack) in enumerate(homeless):
            owner = entry.owner
            earlier = places.get(owner)
            owned = earlier is not None and earlier.flattened == owner.data_ptr()
            places[owner] = Place(space, index, pack, owned=owned, like=owner if distributed else None)

    flattened = flatten([places[p] for p in owners], params, settings.flatten and not distributed)
    cohorts: dict[tuple, Cohort] = {}
    members, writes = [], []
    for (owner, p, position, number, group, taken, scalars, first_draw), beside in zip(entries, numbers):
        place = places[owner]
        writes += adopt_states(optimizer, owner, group, place, stored, beside)
        if settings.ema_decay is not None:
            writes += ema.adopt(optimizer._ema, owner, place)
        key = (number, taken, scalars)
        if key not in cohorts:
            cohorts[key] = Cohort(len(cohorts), group, taken, tuple(map(Scalar.tensor, scalars)))
        cohort = cohorts[key]
        member = Member(owner, p, position, cohort.number, place, first_draw)
        cohort.members.append(member)
        members.append(member)
    write(optimizer, writes)
    for cohort in cohorts.values() if rule.scalars else ():
        cohort.find_slots()
    averages = rule.averages if settings.ema_decay is None else (*rule.averages, ema.ROLE)
    return Bucket(
        rule, device, dtype, grad_dtype, choice, flattened, stored, averages, fused, listed, spread or (),
        list(cohorts.values()), members,
    )  # fmt: skip


def _numbers(entry: Entry, rule: Rule, counts: bool) -> dict[str, Scalar]:
    """What stands beside a parameter's states: its step count, its rule's scalars."""
    step = {"step": Scalar(float(entry.taken), _get_scalar_dtype())} if counts else {}
    return {**step, **dict(zip(rule.scalars, entry.scalars))}


def _overlapping(params: Sequence[Tensor]) -> set[int]:
    """The ids of parameters whose memory begins inside another one's, and of those others."""
    ends = sorted(((p.data_ptr(), p.data_ptr() + _extent(p), id(p)) for p in params if p.numel()), key=itemgetter(0))
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
