"""How states come into their places, where a plan is made.

New ones begin there. What somebody else put into ``optimizer.state[p]`` (a loaded checkpoint, a tensor of their own) is
copied in; only memory shared between processes is used as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import ema
from .cohorts import Scalar
from .encodings import beginning, begins_alike, converted, superseded
from .places import Place, adoption_key, is_shared
from .rule import Rule
from .shards import local
from .storage import Storage, state_keys
from .survey import Entry, Key
from .upload import free_later

Write = tuple[Tensor, Tensor | float]
"""A view, and what it is to be filled with."""


class Change(NamedTuple):
    """What a dict of tensors gets and loses once the new tensors are filled: an interrupt before that loses nothing."""

    entries: dict[Any, Any]
    new: dict[Any, Tensor]
    gone: Sequence[str] = ()

    def make(self) -> None:
        for key in self.entries.keys() & {*self.new, *self.gone}:
            if isinstance(dropped := local(self.entries[key]), Tensor):
                free_later(dropped)
        self.entries.update(self.new)
        for key in self.gone:
            del self.entries[key]


def adopt(
    optimizer: Any, key: Key, entries: Sequence[Entry], homes: Sequence[Place], count_dtype: torch.dtype | None
) -> None:
    """Let the states and moving averages of a bucket's parameters lie in their places, with the values that they have,
    or begin with.

    Args:
        entries: the parameters.
        homes: the place of each.
        count_dtype: of step counts; None where there are none among the states.
    """
    settings, rule, stored = optimizer._settings, key.rule, key.stored
    adoption, keys = adoption_key(rule, settings, key.capturable), tuple(state_keys(optimizer, rule, stored))
    writes: list[Write] = []
    changes, unsettled = [], []
    beginners: dict[int, tuple[dict, dict[str, Scalar], list[tuple[Tensor, Tensor, Place]]]] = {}
    """By group."""
    for place, entry in zip(homes, entries):
        owner, group, number = entry.owner, entry.group, entry.group_number
        if key.capturable and count_dtype is None:
            writes += count_aside(optimizer, owner, place, stored, entry.taken)
        if not entry.settled or place.adoption is None:
            unsettled.append(place)
            if entry.state and keys:
                fills, change = adopt_states(optimizer, entry, place, stored, numbers_of(entry, rule, count_dtype))
                writes += fills
                changes.append(change)
            elif keys:
                if number not in beginners:
                    beginners[number] = group, numbers_of(entry, rule, count_dtype), []
                beginners[number][2].append((owner, entry.param, place))
        if settings.ema_decay is not None:
            fills, new = ema.adopt(optimizer._ema, owner, place)
            writes += fills
            changes.append(Change(optimizer._ema, new))
    for group, numbers, some in beginners.values():
        fills, begun = begin_states(optimizer, group, some, stored, numbers)
        writes += fills
        changes += begun
    write(optimizer, writes)
    for change in changes:
        change.make()
    for place in unsettled:
        place.settle(adoption, keys)


def numbers_of(entry: Entry, rule: Rule, count_dtype: torch.dtype | None) -> dict[str, Scalar]:
    """What stands beside a parameter's states: its step count, if there is one, its rule's scalars."""
    taken = entry.taken if isinstance(entry.taken, Tensor) else float(entry.taken)
    step = {} if count_dtype is None else {"step": Scalar(taken, count_dtype)}
    return step | dict(zip(rule.scalars, entry.scalars))


def begin_states(
    optimizer: Any,
    group: dict,
    beginners: Sequence[tuple[Tensor, Tensor, Place]],
    stored: Storage,
    numbers: dict[str, Scalar],
) -> tuple[list[Write], list[Change]]:
    """Give every empty ``optimizer.state[p]`` views of its place. Returns what has to be written into them (new memory
    holds zeros), and the changes that hand them over then.

    Args:
        beginners: parameters of one group as the optimizer holds them, what this rank updates of them, and places.
        numbers: what stands beside the states: the step count, where there is one, and the rule's scalars.
    """
    states: list[dict[str, Tensor]] = [{} for _ in beginners]
    writes = []
    for key, number in numbers.items():
        for state, (_, _, place) in zip(states, beginners):
            view = state[key] = place.open_number(key, number.dtype)
            if number.value or place.adoption is not None:
                writes.append((view, number.value))
    for role, form, parts in stored.kept_parts:
        if not parts:
            continue
        initial = cache(partial(optimizer.initial_value, group, role))
        alike = [initial()] if begins_alike(role, form) else None
        for state, (_, p, place) in zip(states, beginners):
            values = alike or beginning(role, form, p, place.strides, initial)
            for (key, part), value in zip(parts.items(), values):
                view = state[key] = place.open(key, part.dtype, part.per)
                if place.adoption is not None or isinstance(value, Tensor) or value:
                    writes.append((local(view), value))
    return writes, [Change(optimizer._states[owner], state) for (owner, _, _), state in zip(beginners, states)]


def adopt_states(
    optimizer: Any, entry: Entry, place: Place, stored: Storage, numbers: dict[str, Scalar]
) -> tuple[list[Write], Change]:
    """The same for one parameter, where something is there already: the views get its values."""
    p = entry.param
    change = Change(optimizer._states[entry.owner], {}, [])
    here = {key: local(value) for key, value in change.entries.items()}
    writes: list[Write] = []
    for key, number in numbers.items():
        if not place.holds(key, here.get(key)):
            view = change.new[key] = place.open_number(key, number.dtype)
            writes.append((view, number.value))
    for role, form, parts in stored.kept_parts:
        if parts and all([place.holds(key, here.get(key)) for key in parts]):
            continue
        value = here.get(role)
        if form.plain and is_shared(value) and not place.packed:
            place.keep(role, value)
            continue
        initial = partial(optimizer.initial_value, entry.group, role)
        values = converted(role, form, here, p, place.strides, initial) if parts else []
        for (key, part), value in zip(parts.items(), values):
            view = change.new[key] = place.open(key, part.dtype, part.per)
            writes.append((local(view), value))
        change.gone.extend(superseded(role, form, here, p))
    return writes, change


def count_aside(optimizer: Any, p: Tensor, place: Place, stored: Storage, taken: int) -> list[Write]:
    """Make the place count steps where torch keeps no count, so that the device can tell a first step from others. To
    be called before the states are adopted. Returns what has to be written."""
    state = optimizer._states.get(p, {})
    if "step" in place.views and all(place.holds(key, state.get(key)) for key in stored.kept_keys):
        return []
    return [(place.open_number("step", torch.float32), float(taken))]


def write(optimizer: Any, writes: list[Write]) -> None:
    """Fill views. Where states were exchanged, a value may be one of the views, and a view may still be the state
    of another parameter: both are copied before anything is overwritten."""
    views = {view.data_ptr(): view for view, _ in writes if view.numel()}
    writes = [(v, x.clone() if isinstance(x, Tensor) and x.data_ptr() in views else x) for v, x in writes]
    for state in optimizer._states.values() if any(isinstance(x, Tensor) for _, x in writes) else ():
        for key, value in state.items() if isinstance(state, dict) else ():
            part = local(value)
            if isinstance(part, Tensor) and part is not views.get(part.data_ptr(), part):
                state[key] = value.clone()
    for view, value in writes:
        view.copy_(value) if isinstance(value, Tensor) else view.fill_(value)


def has_shared_state(state: dict[str, Any], place: Place | None) -> bool:
    """Whether a state lies in memory shared between processes, as Adagrad.share_memory() puts it."""
    return any(
        is_shared(value)
        for key, value in state.items()
        if place is None or not place.holds(key, value) or not place.packed
    )
