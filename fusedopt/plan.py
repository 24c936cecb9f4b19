"""Which tensors one step reads and writes, worked out once and checked again at every step.

``optimizer.state[p]`` is the truth, as in torch.optim: what somebody loaded or put there is taken over
when the plan is built, and a plan holds only as long as parameters, gradients' layouts and states are
the ones that it was built from.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from itertools import compress
from operator import attrgetter, is_, itemgetter
from typing import Any

import torch
from torch import Tensor

from .backends import Backend
from .flat import Space, is_dense
from .places import Place, adopt_states, flatten, has_shared_state, write
from .rule import Rule
from .storage import Storage, counts_steps
from .survey import Entry, NotFusable, survey

SMALL = 16384
"""Elements below which a CPU spends more on calling an operation than on the numbers."""


get_dtype = attrgetter("dtype")


@dataclasses.dataclass(slots=True, eq=False)
class Member:
    """One parameter with a gradient."""

    param: Tensor
    position: int
    """Its gradient's position among this step's gradients."""
    cohort: int
    place: Place
    first_draw: int
    """The number of its first eight elements among all eights of the optimizer: see philox.py."""


@dataclasses.dataclass(slots=True, eq=False)
class Cohort:
    """The parameters of one group that have been stepped equally often."""

    number: int
    group: dict[str, Any]
    t: int
    """Steps taken."""
    members: list[Member] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(slots=True, eq=False)
class Bucket:
    """What one kernel can update: one device, one set of dtypes, one rule; over all groups."""

    rule: Rule
    device: torch.device
    dtype: torch.dtype
    grad_dtype: torch.dtype
    backend: Backend
    flat: bool
    stored: Storage
    averages: tuple[str, ...]
    """Roles in the members' places that follow the new parameter, in the order of ``Update.averages``."""
    cohorts: list[Cohort]
    members: list[Member]


class Plan:
    """The buckets of one step, and what must stay as it is for them to be right."""

    def __init__(self, optimizer: Any, places: dict[Tensor, Place]):
        groups = optimizer.param_groups
        self.params = [p for group in groups for p in group["params"]]
        self.group_sizes = [len(group["params"]) for group in groups]
        rules = [optimizer.rule(group) for group in groups]
        self.present = [p.grad is not None for p in self.params]
        self.flatten = optimizer._settings.flatten
        self.requested_backend = optimizer._settings.backend
        self.master, self.state_dtype = optimizer._settings.master, optimizer._settings.state_dtype

        newcomers = survey(optimizer, rules)
        for stale in set(places).difference(self.params):
            del places[stale]
        self.buckets = [_settle(optimizer, key, entries, places) for key, entries in newcomers.items()]

        members = [member for bucket in self.buckets for member in bucket.members]
        self.active = list(compress(self.params, self.present))
        self.grad_dtypes = [p.grad.dtype for p in self.active]
        self.sizes = list(map(Tensor.numel, self.active))
        self.addresses = list(map(Tensor.data_ptr, self.active))
        self.strides = list(map(Tensor.stride, self.active))
        self.dtypes = [p.dtype for p in self.active]
        self.spaces = list({id(m.place.space): m.place.space for m in members}.values())
        self.steps = [space.buffers["step"] for space in self.spaces if "step" in space.buffers]
        self.stepped = [_stepped(space, members) for space in self.spaces if "step" in space.buffers]
        self.identities = _identities(optimizer, self.params)
        self.views = []
        for bucket in self.buckets:
            keys = list(bucket.stored.parts)
            dicts = [optimizer.state[m.param] for m in bucket.members] if keys else []
            if counts_steps(optimizer, bucket.stored):
                keys.append("step")
            self.views += [
                (itemgetter(key), dicts, [m.place.views[key].data_ptr() for m in bucket.members])
                for key in keys
                if dicts
            ]
        self.note_steps()

    def note_steps(self) -> None:
        self.step_values = [steps.tolist() for steps in self.steps]

    def holds(self, optimizer: Any, params: list[Tensor], grads: list[Tensor | None]) -> bool:
        """Whether the same plan serves this step. Runs at every step: about 0.5 us per parameter. What it leaves
        out, shapes of equal size and sparse gradients, is noticed where gradients are taken."""
        if [g is not None for g in grads] != self.present:
            return False
        active = self.active
        active_grads = grads if len(active) == len(grads) else list(compress(grads, self.present))
        settings = optimizer._settings
        return (
            settings.flatten is self.flatten
            and settings.backend is self.requested_backend
            and settings.master is self.master
            and settings.state_dtype is self.state_dtype
            and _same(_identities(optimizer, params), self.identities)
            and [len(group["params"]) for group in optimizer.param_groups] == self.group_sizes
            and list(map(Tensor.data_ptr, active)) == self.addresses
            and list(map(Tensor.stride, active)) == self.strides
            and list(map(get_dtype, active)) == self.dtypes
            and list(map(get_dtype, active_grads)) == self.grad_dtypes
            and list(map(Tensor.numel, active_grads)) == self.sizes
            and self._states_hold()
            and self.step_values == [steps.tolist() for steps in self.steps]
        )

    def _states_hold(self) -> bool:
        try:
            return all(list(map(Tensor.data_ptr, map(get, dicts))) == addresses for get, dicts, addresses in self.views)
        except (KeyError, TypeError):  # a state was deleted, or is no tensor any more
            return False

    def advance(self, by: int) -> None:
        """Count steps that were taken, or take back what turned out to be skipped."""
        if not by:
            return
        for bucket in self.buckets:
            for cohort in bucket.cohorts:
                cohort.t += by
        for steps, stepped in zip(self.steps, self.stepped):
            steps.add_(stepped, alpha=by)
        self.note_steps()


def _identities(optimizer: Any, params: list[Tensor]) -> list[Any]:
    """Objects that must stay the same ones: groups and what they ask for, parameters, their states."""
    groups = optimizer.param_groups
    differentiable = [group.get("differentiable") for group in groups]
    return [*groups, *map(optimizer.rule, groups), *differentiable, *params, *optimizer.state.values()]


def _same(a: list[Any], b: list[Any]) -> bool:
    return len(a) == len(b) and all(map(is_, a, b))


def _stepped(space: Space, members: list[Member]) -> Tensor:
    """1 for each of the space's tensors that takes this step, else 0."""
    stepped = torch.zeros_like(space.buffers["step"])
    stepped[[m.place.index for m in members if m.place.space is space]] = 1
    return stepped


def _settle(optimizer: Any, key: tuple, entries: list[Entry], places: dict[Tensor, Place]) -> Bucket:
    """Give every parameter of a bucket its place, and its state the place's memory."""
    device, dtype, grad_dtype, rule, choice, stored = key
    params = [entry.param for entry in entries]
    overlapping = _overlapping(params)
    if overlapping and (choice.name == "triton" or any(id(p) in overlapping and not is_dense(p) for p in params)):
        raise NotFusable("parameters that share memory, or whose elements lie between each other's")
    # Blocks of quantized values, and random bits, go by tensor.
    gathers = choice.name == "torch" and stored.plain
    irregular = [gathers and not is_dense(p) for p in params]
    gathers = gathers and device.type == "cpu"
    small = [
        gathers and p.numel() < SMALL and id(p) not in overlapping and not has_shared_state(optimizer, p, places.get(p))
        for p in params
    ]
    settings = optimizer._settings
    enough = sum(small) >= rule.few and (not rule.single_pass or settings.flatten or settings.needs_norm)
    # What was gathered once stays so, or parameters that have no gradient at some steps would wander.
    packed = [a or (b and (enough or (p in places and places[p].packed))) for a, b, p in zip(irregular, small, params)]

    homeless = [
        (entry, pack)
        for entry, pack in zip(entries, packed)
        if entry.param not in places or not places[entry.param].fits(entry.param, stored.parts, pack)
    ]
    if homeless:
        # Small ones first, and group by group, so that each cohort's lie side by side.
        homeless.sort(key=lambda pair: not pair[1])
        space = Space([entry.param for entry, _ in homeless], packed=sum(pack for _, pack in homeless))
        for index, ((p, *_), pack) in enumerate(homeless):
            earlier = places.get(p)
            owned = earlier is not None and earlier.flattened == p.data_ptr()
            places[p] = Place(space, index, pack, owned=owned)

    flattened = flatten([places[p] for p in params], params, settings.flatten)
    cohorts: dict[tuple[int, int], Cohort] = {}
    members, writes = [], []
    for p, position, number, group, taken, first_draw in entries:
        place = places[p]
        writes += adopt_states(optimizer, p, group, place, stored, taken)
        cohort = cohorts.setdefault((number, taken), Cohort(len(cohorts), group, taken))
        member = Member(p, position, cohort.number, place, first_draw)
        cohort.members.append(member)
        members.append(member)
    write(optimizer, writes)
    together = list(cohorts.values())
    return Bucket(rule, device, dtype, grad_dtype, choice, flattened, stored, rule.averages, together, members)


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
