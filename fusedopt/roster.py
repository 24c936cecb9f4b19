"""Plans for steps at which other parameters have gradients than at the step before, as in mixtures of experts.

What planning finds out about a parameter (its bucket, its place, its states) does not depend on which others have a
gradient. So it is kept for every parameter that was planned for, and a plan for any set of these is put together from
it: as many checks as an unchanged step makes, then lists picked by C code. Only the numbers by which parameters form
cohorts are read anew.

Where a check fails, or a parameter comes that is not listed, planning begins at the parameters again. There is one
roster per optimizer, of at most all its parameters; nothing is kept by set.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator
from itertools import compress
from operator import attrgetter, gt, is_, is_not, itemgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .buckets import Bucket, Member, sharing_memory
from .cohorts import Cohort, Scalar
from .counts import Counts
from .ema import ROLE
from .flat import Space
from .gather import picker
from .groups import get_params
from .identity import same
from .layouts import Among, Layouts
from .places import adoption_key
from .plan import Plan, get_dtype, get_kind
from .shards import is_distributed, local

get_position = attrgetter("position")

TRIALS = 3
"""Steps after which a set that stays the same is planned for anew, as one that lasts."""


class Listed:
    """The parameters of one bucket, with a gradient at this step or without, in the optimizer's order."""

    def __init__(self, optimizer: Any, bucket: Bucket, members: list[Member]):
        places = [m.place for m in members]
        self.spaces = list(dict.fromkeys(place.space for place in places))
        flat = len(self.spaces) == 1 and all(place.flattened is not None for place in places)
        self.bucket = dataclasses.replace(bucket, flat=flat, passing=True, cohorts=[], members=members)
        self.distributed = is_distributed(members[0].owner)
        self.keys = places[0].keys
        # A state may have gone since the plan. Not optimizer._states[...], which would make an empty one.
        self.states = [optimizer._states.get(m.owner, {}) for m in members] if self.keys else []
        self.parts: list[list[Tensor]] = []
        """What must be under each key, of distributed states the local parts, and where that must lie."""
        self.hold_states()
        self.addresses = [[place.addresses[key] for place in places] for key in self.keys]
        positions = list(map(get_position, members))
        self.pick = picker(positions)
        self.groups = optimizer.param_groups
        ends = np.cumsum(list(map(len, map(get_params, self.groups))))
        self.numbers = np.searchsorted(ends, positions, "right") << 40
        """Their parameter groups, above what a step count needs."""

        self.at: np.ndarray | None = None
        """Where their step counts are among all, if the host counts them."""
        self.scalars = () if bucket.capturable else bucket.rule.scalars
        starts = itertools.accumulate((len(space.sizes) for space in self.spaces), initial=0)
        self.at_scalars = self._indices(dict(zip(self.spaces, starts))) if self.scalars else None
        """Where their scalars are among those of all these spaces."""
        self.scalar_dtypes = [places[0].space.numbers[key].dtype for key in self.scalars]

    def hold_states(self) -> None:
        """Those that the places hold now."""
        self.parts = [[m.place.views[key] for m in self.bucket.members] for key in self.keys]

    def find(self, starts: dict[Space, int]) -> None:
        """Note where the members' step counts are, given where those of each space begin."""
        if "step" in self.keys and not self.bucket.capturable:
            self.at = self._indices(starts)

    def _indices(self, starts: dict[Space, int]) -> np.ndarray:
        places = [m.place for m in self.bucket.members]
        return np.array([starts[place.space] + place.index for place in places])

    def views(self, here: list[bool]) -> list[tuple[Callable[[dict], Tensor], list[dict], list[Tensor]]] | None:
        """For each state of those that are here, what a plan keeps of it; None if one is not the tensor that it was, or
        in other memory. Of the others nobody asks."""
        found = []
        states = list(compress(self.states, here))
        if not set(map(len, states)) <= {len(self.keys)}:
            return None
        for key, parts, addresses in zip(self.keys, self.parts, self.addresses):
            get, parts = itemgetter(key), list(compress(parts, here))
            try:
                values = list(map(get, states)) if self.distributed else parts
                if not all(map(is_, map(local, values) if self.distributed else map(get, states), parts)):
                    return None
            except KeyError:
                return None
            if list(map(Tensor.data_ptr, parts)) != list(compress(addresses, here)):
                return None
            found.append((get, states, values))
        return found

    def bucket_of(self, here: list[bool], counts: np.ndarray, stepped: np.ndarray) -> Bucket:
        """The bucket of a step, of those that are here. They form cohorts by their groups, step counts and scalars;
        ``stepped`` notes who they are."""
        members, mask = list(compress(self.bucket.members, here)), np.array(here)
        numbers = self.numbers[mask]
        if self.at is not None:
            at = self.at[mask]
            numbers = numbers + counts[at].astype(np.int64)
            stepped[at] = 1
        elif not self.bucket.capturable:  # only whether the states were ever written matters, and they are there
            numbers = numbers + bool(self.bucket.rule.keys)
        columns = [column[mask] for column in self._read_scalars()]
        kinds = numbers
        for column in columns:
            pairs = (np.unique(x, return_inverse=True)[1] for x in (kinds, column))
            kinds = np.ravel_multi_index(tuple(pairs), (len(column), len(column)))
        _, first, cohort_of = np.unique(kinds, return_index=True, return_inverse=True)
        cohorts = []
        for k in first.tolist():
            group, taken = divmod(int(numbers[k]), 1 << 40)
            scalars = tuple(Scalar(column[k], dtype).number() for column, dtype in zip(columns, self.scalar_dtypes))
            cohorts.append(Cohort(len(cohorts), self.groups[group], taken, scalars))
        for member, number in zip(members, cohort_of.tolist()):
            member.cohort = number
            cohorts[number].members.append(member)
        return dataclasses.replace(self.bucket, cohorts=cohorts, members=members)

    def _read_scalars(self) -> Iterator[np.ndarray]:
        for key in self.scalars:
            everywhere = torch.cat([space.numbers[key] for space in self.spaces])
            yield everywhere.double().numpy()[self.at_scalars]


class Roster:
    """Every parameter that was planned for, as far as it still is as it was then.

    Args:
        optimizer: whose parameters they are.
        plan: the latest one.
        earlier: the roster before it, of which those are taken over that the plan does not have.
    """

    def __init__(self, optimizer: Any, plan: Plan, earlier: Roster | None):
        self.whole = plan
        self.threads = torch.get_num_threads()
        found = {_kind(bucket): (bucket, list(bucket.members)) for bucket in plan.buckets}
        addresses = dict(zip(compress(range(len(plan.params)), plan.present), map(Tensor.data_ptr, plan.active)))
        if earlier is not None and earlier.lists(plan) and earlier.threads == self.threads:
            for bucket, member, address in earlier._others(optimizer, plan):
                found.setdefault(_kind(bucket), (bucket, []))[1].append(member)
                addresses[member.position] = address
        self.listed = [Listed(optimizer, b, sorted(members, key=get_position)) for b, members in found.values()]
        self.distributed = any(listed.distributed for listed in self.listed)
        self.known = [k in addresses for k in range(len(plan.params))]
        self.parts = list(map(local, compress(plan.params, self.known)))
        """The parameters, of distributed ones the local parts, and where they must lie."""
        self.addresses = [addresses[k] for k in sorted(addresses)]
        self.sizes, self.strides = list(map(Tensor.numel, self.parts)), list(map(Tensor.stride, self.parts))
        self.kinds = list(map(get_kind, self.parts))
        self.dtypes = list(map(get_dtype, self.parts))
        self.stand_ins = [p.detach() for p in self.parts]
        """In the place of gradients that are missing, to compare layouts."""
        self.layouts = Layouts(self.parts)
        self.grad_layouts = Layouts(self.stand_ins)
        self.spaces = list(dict.fromkeys(space for listed in self.listed for space in listed.spaces))
        counting = [space for space in self.spaces if "step" in space.numbers and not space.capturable]
        self.steps = [space.numbers["step"] for space in counting]
        """The step counts of all tensors in these."""
        self.ends = np.cumsum([0, *map(len, self.steps)])
        for listed in self.listed:
            listed.find(dict(zip(counting, self.ends.tolist())))

    @classmethod
    def of(cls, optimizer: Any, plan: Plan, earlier: Roster | None) -> Roster | None:
        """The roster after that plan; None where the parameters present decide how others are updated."""
        if not plan.buckets:
            return earlier
        if list(map(Tensor.data_ptr, plan.pinned)) != plan.addresses:
            return None
        made = cls(optimizer, plan, earlier)
        return None if sharing_memory(made.parts) else made

    def plan(self, optimizer: Any, params: list[Tensor], grads: list[Tensor | None]) -> Plan | None:
        """A plan for these gradients, if all that is known still holds."""
        present = [g is not None for g in grads]
        if any(map(gt, present, self.known)) or not self._holds(optimizer, params, grads):
            return None
        here, masks = list(compress(present, self.known)), [listed.pick(present) for listed in self.listed]
        some = [(listed, mask) for listed, mask in zip(self.listed, masks) if any(mask)]
        views = [listed.views(mask) for listed, mask in some]
        if None in views:
            return None
        counts = np.concatenate([numbers.numpy() for numbers in self.steps]) if self.steps else np.zeros(0)
        stepped = np.zeros_like(counts)
        buckets = [listed.bucket_of(mask, counts, stepped) for listed, mask in some]
        by_space = np.split(stepped, self.ends[1:-1]) if self.steps else ()
        return self.whole.for_set(
            present=present,
            buckets=buckets,
            views=[column for columns in views for column in columns],
            active=list(compress(self.parts, here)),
            kinds=list(compress(self.kinds, here)),
            sizes=list(compress(self.sizes, here)),
            strides=list(compress(self.strides, here)),
            grad_dtypes=list(compress(self.dtypes, here)),
            param_layouts=Among(self.layouts, self.parts, here),
            grad_layouts=Among(self.grad_layouts, self.stand_ins, here),
            spaces=self.spaces,
            counts=Counts(
                self.spaces, [torch.from_numpy(part).to(numbers.dtype) for part, numbers in zip(by_space, self.steps)]
            ),
            # The fallback would gather the gradients of a set that stays.
            lasts=TRIALS if any(bucket.fused for bucket in buckets) else math.inf,
        )

    def _holds(self, optimizer: Any, params: list[Tensor], grads: list[Tensor | None]) -> bool:
        whole, settings = self.whole, optimizer._settings
        gradients = [other if g is None else g for g, other in zip(compress(grads, self.known), self.stand_ins)]
        return (
            settings.layout == whole.settings
            and torch.get_num_threads() == self.threads
            and whole.groups.hold(optimizer)
            and same(optimizer._states.values(), whole.states)
            and not (self.distributed and any(map(is_not, map(local, compress(params, self.known)), self.parts)))
            and list(map(Tensor.data_ptr, self.parts)) == self.addresses
            and self.layouts.hold(self.parts)
            and self.grad_layouts.hold(gradients)
            and (settings.ema_decay is None or all(self._averages_hold(optimizer)))
        )

    def _averages_hold(self, optimizer: Any) -> Iterator[bool]:
        for listed in self.listed:
            for m in listed.bucket.members:
                yield m.place.holds(ROLE, optimizer._ema.get(m.owner))

    def lend(self) -> None:
        """Hold states no longer, until ``take_back``."""
        for listed in self.listed:
            listed.parts = []

    def take_back(self) -> None:
        """Hold those again that the places hold."""
        for listed in self.listed:
            listed.hold_states()

    def lists(self, plan: Plan) -> bool:
        """Whether it was made for the parameter groups and the settings that this plan is for."""
        return self.whole.groups.same(plan.groups) and self.whole.settings == plan.settings

    def _others(self, optimizer: Any, plan: Plan) -> Iterator[tuple[Bucket, Member, int]]:
        """The parameters that the plan does not have, if their states are settled where they were."""
        addresses = dict(zip(compress(range(len(self.known)), self.known), self.addresses))
        for listed in self.listed:
            adoption = adoption_key(listed.bucket.rule, optimizer._settings, listed.bucket.capturable)
            for m in listed.bucket.members:
                if plan.present[m.position] or m.param.data_ptr() != addresses[m.position]:
                    continue
                if m.place.is_settled(m.param, optimizer._states.get(m.owner, {}), adoption):
                    yield listed.bucket, m, addresses[m.position]


def _kind(bucket: Bucket) -> tuple:
    """Equal for buckets whose members may be in one."""
    first = bucket.members[0]
    numbers = frozenset((key, x.dtype) for key, x in first.place.space.numbers.items())
    return (
        bucket.rule, bucket.device, bucket.dtype, bucket.grad_dtype, bucket.backend, bucket.stored, bucket.averages,
        bucket.fused, bucket.listed, bucket.spread, bucket.capturable, numbers, is_distributed(first.owner),
    )  # fmt: skip
