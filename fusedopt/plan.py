"""Which tensors one step reads and writes, worked out once and checked again at every step.

``optimizer.state[p]`` is the truth, as in torch.optim: what somebody loaded or put there is taken over
when the plan is built, and a plan holds only as long as parameters, gradients' layouts and states are
the ones that it was built from.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import math
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, compress
from operator import attrgetter, itemgetter
from typing import Any

import torch
from torch import Tensor

from . import means
from .buckets import Bucket, Member, make_bucket
from .cohorts import StoredScalars
from .counts import Counts
from .distributed import MeansOverRanks, Reduction
from .flat import Space
from .groups import Groups, params_of
from .identity import same, same_tensors
from .layouts import Layouts
from .places import Place, finished
from .shards import Shards, is_distributed, local
from .storage import state_keys
from .survey import survey

get_dtype = attrgetter("dtype")
get_kind = attrgetter("dtype", "device")
use_count = torch._C._storage_Use_Count

MANY = 100_000
"""New objects from which on a search for garbage among them is saved."""


@contextlib.contextmanager
def without_collection() -> Iterator[None]:
    """Planning makes objects by the million and drops next to none: Python's search for garbage among them would take
    half as long again."""
    enabled = gc.isenabled()
    try:
        gc.disable()
        yield
    finally:
        if enabled:
            if gc.get_count()[0] > MANY and not gc.get_freeze_count():
                # Makes all objects old at once, for which Python would search the young ones twice more.
                gc.freeze()
                gc.unfreeze()
            gc.enable()


class Plan:
    """The buckets of one step, and what must stay as it is for them to be right."""

    def __init__(self, optimizer: Any, places: dict[Tensor, Place], grads: list[Tensor | None]):
        groups = optimizer.param_groups
        self.params = params_of(optimizer)
        rules = [optimizer.rule(group) for group in groups]
        self.present = [g is not None for g in grads]
        self.settings = optimizer._settings.layout

        self.reduction = Reduction(self.params, optimizer._settings.clip_group)
        if optimizer._settings.needs_norm or optimizer._settings.track is not None:
            self.reduction.check()
        joined = means.needed(optimizer) if self.reduction.all_reduces else 0
        self.joined_means = MeansOverRanks(self.params, self.reduction, joined) if joined else None
        """What joins the ranks' parts of means over whole parameters, where means are needed."""
        newcomers = survey(optimizer, rules, grads, self.reduction, places)
        entries = chain.from_iterable(newcomers.values()) if optimizer.begins_at_rate else ()
        self.beginners = {entry.owner for entry in entries if not entry.state}
        """Parameters whose states begin at the learning rate of this plan's first step."""
        known = set(map(id, self.params))
        for kept in (places, optimizer._ema):
            for stale in [p for p in kept if id(p) not in known]:
                del kept[stale]
        with finished(places):
            self.buckets = [make_bucket(optimizer, key, entries, places) for key, entries in newcomers.items()]

        self.active = list(map(local, compress(self.params, self.present)))
        present_grads = list(compress(grads, self.present))
        self.grad_dtypes = list(map(get_dtype, present_grads))
        self.sizes = list(map(Tensor.numel, self.active))
        self.kinds = list(map(get_kind, self.active))
        self.strides = list(map(Tensor.stride, self.active))
        self.param_layouts = Layouts(self.active)
        self.grad_layouts = Layouts(present_grads)
        self.as_planned = True
        """Whether this step's gradients are laid out as those that the plan was built from."""
        members = [member for bucket in self.buckets for member in bucket.members]
        self.spaces = list(dict.fromkeys(m.place.space for m in members))
        counting = [space for space in self.spaces if not space.capturable]
        stepped = _stepped(counting, [m for b in self.buckets if not b.capturable for m in b.members])
        self.counts = Counts(counting, stepped)
        self.groups = Groups(optimizer, joins=any(bucket.backend.name == "torch" for bucket in self.buckets))
        self._note_states(optimizer)
        self.averages = list(optimizer._ema.values())
        self.lasts = math.inf
        """For how many more steps the plan may serve."""
        self._note_buckets()

    def _note_states(self, optimizer: Any) -> None:
        self.states = list(optimizer._states.values())
        self.contents = [dict(state) if isinstance(state, dict) else state for state in self.states]
        self.views = [column for bucket in self.buckets for column in _views(optimizer, bucket)]

    def _note_buckets(self) -> None:
        self.devices = {bucket.device for bucket in self.buckets}
        self.may_be_captured = any(b.capturable or b.device.type == "cuda" for b in self.buckets)
        self.counted = [bucket for bucket in self.buckets if not bucket.capturable]
        """Those whose steps the host counts."""
        self.scalars = [StoredScalars(bucket.rule, bucket.cohorts) for bucket in self.counted if bucket.rule.scalars]
        distributed = [m.owner for b in self.buckets if is_distributed(b.members[0].owner) for m in b.members]
        self.shards = Shards(distributed, self._distributed_states()) if distributed else None

    def _distributed_states(self) -> Iterator[Any]:
        return (value for *_, views in self.views for value in views if is_distributed(value))

    def for_set(self, **found: Any) -> Plan:
        """The plan for another set of gradients. ``found``: the attributes that depend on the set."""
        plan = copy.copy(self)
        vars(plan).update(found)
        plan.as_planned = True
        plan._note_buckets()
        return plan

    def knows(self, optimizer: Any) -> bool:
        """Whether settings, groups, parameters, states and averages are those that it was made of. Runs at every step,
        as ``holds`` does after it."""
        groups, states = optimizer.param_groups, list(optimizer._states.values())
        return (
            optimizer._settings.layout == self.settings
            and same(optimizer._ema.values(), self.averages)
            and (
                (
                    same_tensors((groups, states), (self.groups.latest, self.contents))
                    and same(groups, self.groups.groups)
                )
                or (self.groups.hold(optimizer) and self._states_hold(states))
            )
        )

    def holds(self, grads: list[Tensor | None]) -> bool:
        """Whether the same plan serves this step, if it knows the optimizer. ``bench/scale.py`` says how long it takes.

        Each check is one pass in C over cached lists, and none makes an object per tensor, of which the garbage
        collector would take notice. What they leave out is noticed otherwise: gradients of other shapes but equal
        size, and sparse ones, where gradients are taken. Where nobody has noted a parameter's memory, it may move.
        """
        active, active_grads = self.active, grads
        # Never true of a list in which one is None.
        self.as_planned = len(grads) == len(active) and self.grad_layouts.hold(grads)
        if not self.as_planned:
            if [g is not None for g in grads] != self.present:
                return False
            active_grads = list(compress(grads, self.present))
            self.as_planned = self.grad_layouts.hold(active_grads)
        self.lasts -= 1
        return (
            self.lasts >= 0
            and list(map(Tensor.data_ptr, self.pinned)) == self.addresses
            and (self.param_layouts.hold(active) or self._layouts_hold())
            and (self.as_planned or self._sizes_hold(active_grads))
            and list(map(use_count, self.handles)) == self.uses
            and (self.shards is None or self.shards.hold())
            and self.counts.hold()
        )

    def _sizes_hold(self, grads: Sequence[Tensor]) -> bool:
        """Whether the gradients have the dtypes and sizes that they had, with whatever strides."""
        return list(map(get_dtype, grads)) == self.grad_dtypes and list(map(Tensor.numel, grads)) == self.sizes

    def _layouts_hold(self) -> bool:
        """Whether every parameter has the dtype, device, size and strides that it had."""
        active = self.active
        return (
            list(map(Tensor.stride, active)) == self.strides
            and list(map(Tensor.numel, active)) == self.sizes
            and list(map(get_kind, active)) == self.kinds
        )

    def _states_hold(self, states: list[dict]) -> bool:
        """Whether every state is the tensor that it was."""
        if same_tensors(states, self.contents):
            return True
        # What somebody else keeps among the states may change.
        try:
            kept = (same(list(map(get, dicts)), values) for get, dicts, values in self.views)
            return same(states, self.states) and all(kept)
        except KeyError:  # a state was deleted
            return False

    def note_memory(self, executors: Sequence[Any]) -> None:
        """Remember where the executors, now that they are made, expect parameters, and how often the spaces' buffers
        are in use."""
        self.pinned = [m.param for executor in executors for m in executor.pinned]
        self.addresses = list(map(Tensor.data_ptr, self.pinned))
        self._note_uses()

    def _note_uses(self) -> None:
        self.storages = [storage for space in self.spaces for storage in space.storages()]
        self.handles = [storage._cdata for storage in self.storages]
        self.uses = list(map(use_count, self.handles))

    @property
    def lends(self) -> bool:
        """Whether states can be let go between steps: kernels know most by address only."""
        return all(b.backend.name == "triton" and not b.flat and not b.capturable for b in self.buckets)

    def lend(self) -> None:
        """Hold states no longer, until ``take_back``. It knows nothing until then."""
        self.contents, self.views, self.storages, self.handles, self.uses = [], [], [], [], []
        if self.shards is not None:
            self.shards.hold_states(())

    def take_back(self, optimizer: Any) -> None:
        """Hold the states again, which are where they were."""
        self._note_states(optimizer)
        self._note_uses()
        if self.shards is not None:
            self.shards.hold_states(self._distributed_states())

    def advance(self, optimizer: Any, by: int) -> None:
        """Count steps that were taken, or take back what turned out to be skipped: of a rule with scalars the latest
        step at most."""
        if not by:
            return
        lasts, self.lasts = self.lasts, 0  # behind an interrupt a new plan reads from the states what was counted
        for bucket in self.counted:
            for cohort in bucket.cohorts:
                cohort.t += by
                if bucket.rule.scalars:
                    cohort.turn(optimizer, forwards=by > 0)
        for stored in self.scalars:
            stored.write()
        self.counts.advance(by)
        self.lasts = lasts

    def has_beginners(self, taken: int) -> bool:
        """Whether states that began with this plan, at a learning rate, may be of parameters that have taken so many
        steps."""
        return bool(self.beginners) and any(cohort.t == taken for bucket in self.counted for cohort in bucket.cohorts)

    def drop_unwritten(self, optimizer: Any) -> bool:
        """Remove the states of parameters that have not taken a step yet, where they begin at the learning rate of the
        one that is taken, and where torch keeps no step count: a momentum buffer exists only once it was written, and
        its absence means the first step. Returns whether there were any."""
        unwritten = list(self._unwritten(optimizer))
        for owner, key in unwritten:
            optimizer._states[owner].pop(key, None)
        return bool(unwritten)

    def _unwritten(self, optimizer: Any) -> Iterator[tuple[Tensor, str]]:
        """The parameters and keys of these states."""
        counts = optimizer.counts_steps
        for bucket in self.counted:
            keys = state_keys(optimizer, bucket.rule, bucket.stored) if counts else bucket.stored.kept_keys
            members = (m for cohort in bucket.cohorts if cohort.t == 0 for m in cohort.members)
            yield from ((m.owner, key) for m in members if not counts or m.owner in self.beginners for key in keys)


def _views(optimizer: Any, bucket: Bucket) -> Iterator[tuple[Callable[[dict], Tensor], list[dict], list[Tensor]]]:
    """For each state of a bucket's parameters: how to get it, the dicts to get it from, what it is now."""
    keys = state_keys(optimizer, bucket.rule, bucket.stored)
    # Looking up what has no state would make an empty one.
    states = [optimizer._states[m.owner] for m in bucket.members] if keys else []
    for key in keys:
        get = itemgetter(key)
        yield get, states, list(map(get, states))


def _stepped(spaces: list[Space], members: list[Member]) -> list[Tensor]:
    """For each space that counts steps: 1 for each of its tensors that takes this step, else 0."""
    indices: dict[Space, list[int]] = {space: [] for space in spaces}
    for m in members:
        indices[m.place.space].append(m.place.index)
    found = []
    for space in spaces:
        if "step" in space.numbers:
            stepped = torch.zeros_like(space.numbers["step"])
            found.append(stepped.index_fill_(0, torch.tensor(indices[space], device="cpu"), 1))
    return found
