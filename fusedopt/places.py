"""Where the state of each parameter lives, and how it got there.

``optimizer.state[p]`` holds views of flat spaces. What somebody else put there (a loaded checkpoint, a
tensor of their own) is copied in; only memory shared between processes is used as it is.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from functools import cache, partial
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .cohorts import Scalar
from .encodings import beginning, begins_alike, converted, superseded
from .flat import Space, is_dense
from .rule import Rule
from .settings import Settings
from .shards import local
from .storage import Part, Storage


@dataclasses.dataclass(slots=True, eq=False)
class Place:
    """Where one parameter's state lives."""

    space: Space
    index: int
    packed: bool
    views: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    addresses: dict[str, int] = dataclasses.field(default_factory=dict)
    """Where the views lay when they were made."""
    flattened: int | None = None
    """The address to which ``flatten`` moved the parameter, until somebody else moves it."""
    owned: bool = False
    """Whether the parameter's memory is an earlier place's, and so may be moved again."""
    like: Tensor | None = None
    """The distributed parameter: its states are distributed like it, each in memory of its own."""
    terms: tuple | None = None
    """On which the state was adopted; None as long as it was not."""
    keys: Sequence[str] = ()
    """Of the state that was adopted then."""

    @property
    def strides(self) -> tuple[int, ...]:
        return self.space.strides[self.index]

    def open(self, key: str, dtype: torch.dtype, per: int = 1) -> Tensor:
        """A view of this parameter's part of the buffer ``key``, with storage of its own; or a distributed tensor.
        ``per``: how many elements share one number."""
        if self.like is not None and per == 1:
            whole = torch.zeros_like(self.like, dtype=dtype)
            self.keep(key, local(whole))
            return whole
        if key not in self.space.unclaimed:
            self.space.allocate(key, dtype, per)
        return self.keep(key, self.space.claim(key, self.index))

    def open_number(self, key: str, dtype: torch.dtype) -> Tensor:
        """A view of this parameter's number among those of ``key``, with storage of its own."""
        if key not in self.space.unclaimed:
            self.space.allocate_numbers(key, dtype)
        return self.keep(key, self.space.claim(key, self.index))

    def keep(self, key: str, view: Tensor) -> Tensor:
        self.views[key] = view
        self.addresses[key] = view.data_ptr()
        return view

    def holds(self, key: str, value: Any) -> bool:
        """Whether ``value`` is this place's view, still where it was made."""
        part = local(value)
        return part is not None and part is self.views.get(key) and part.data_ptr() == self.addresses[key]

    def packed_copy(self, role: str, dtype: torch.dtype) -> Tensor:
        return self.space.packed_copy(role, dtype, self.index)

    def is_for(self, p: Tensor) -> bool:
        """Whether the parameter, or this rank's part of it, still has the layout for which the place was made."""
        space, i = self.space, self.index
        if space.sizes[i] != p.size() or space.dtype != p.dtype or space.device != p.device:
            return False
        return space.strides[i] == p.stride() or not is_dense(p)

    def packs(self, p: Tensor, packed: bool) -> bool:
        """Whether the place is good enough for a parameter that is to be packed, or not."""
        return packed >= self.packed and (self.packed or not packed or is_dense(p))

    def fits(self, p: Tensor, parts: dict[str, Part | Scalar], capturable: bool) -> bool:
        """Whether the place has, or can get, memory for all of these, and numbers where they should be."""
        buffers = {**self.space.buffers, **self.space.numbers}
        if self.space.capturable != capturable:
            return False
        return self.is_for(p) and all(buffers[key].dtype == x.dtype for key, x in parts.items() if key in buffers)

    def settle(self, agreed: tuple, keys: Sequence[str]) -> None:
        """Note on which terms the state was adopted, and under which keys it is."""
        self.terms, self.keys = agreed, keys

    def is_settled(self, p: Tensor, state: dict[str, Any], agreed: tuple) -> bool:
        """Whether nothing of terms, parameter and state has changed since."""
        if self.terms != agreed or len(state) != len(self.keys) or not self.is_for(p):
            return False
        values, held = map(state.get, self.keys), list(map(self.views.get, self.keys))
        if self.like is not None:
            values = map(local, values)
        at = list(map(self.addresses.get, self.keys))
        return all(map(is_, values, held)) and list(map(Tensor.data_ptr, held)) == at


@contextlib.contextmanager
def finished(places: dict[Tensor, Place]) -> Iterator[None]:
    """Drop the places that are not finished where something interrupts the planning."""
    try:
        yield
    except BaseException:
        for p in [p for p, place in places.items() if place.terms is None]:
            del places[p]
        raise


def terms(rule: Rule, settings: Settings, capturable: bool) -> tuple:
    """What decides how a state is adopted, besides the parameter and the state themselves."""
    return rule, settings.layout, capturable


def has_shared_state(state: dict[str, Any], place: Place | None) -> bool:
    """Whether a state lies in memory shared between processes, as Adagrad.share_memory() puts it."""
    return any(
        is_shared(value)
        for key, value in state.items()
        if place is None or not place.holds(key, value) or not place.packed
    )


def is_shared(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_cpu and value.is_shared()


Write = tuple[Tensor, Tensor | float]
"""A view, and what it is to be filled with."""


class Change(NamedTuple):
    """What becomes of a dict of tensors once its new ones are filled: an interrupt before that loses nothing."""

    entries: dict[Any, Any]
    new: dict[Any, Tensor]
    gone: Sequence[str] = ()

    def make(self) -> None:
        self.entries.update(self.new)
        for key in self.gone:
            del self.entries[key]


def begin_states(
    optimizer: Any,
    group: dict,
    beginners: Sequence[tuple[Tensor, Tensor, Place]],
    stored: Storage,
    numbers: dict[str, Scalar],
) -> tuple[list[Write], list[Change]]:
    """Give every empty ``optimizer.state[p]`` views of its place. Returns what has to be written into them, where new
    memory holds zeros, and who gets them then.

    Args:
        beginners: parameters of one group as the optimizer holds them, what this rank updates of them, and places.
        numbers: what stands beside the states: the step count, where there is one, and the rule's scalars.
    """
    states: list[dict[str, Tensor]] = [{} for _ in beginners]
    writes = []
    for key, number in numbers.items():
        for state, (_, _, place) in zip(states, beginners):
            view = state[key] = place.open_number(key, number.dtype)
            if number.value or place.terms is not None:
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
                if place.terms is not None or isinstance(value, Tensor) or value:
                    writes.append((local(view), value))
    return writes, [Change(optimizer.state[owner], state) for (owner, _, _), state in zip(beginners, states)]


def adopt_states(
    optimizer: Any, p: Tensor, group: dict, place: Place, stored: Storage, numbers: dict[str, Scalar]
) -> tuple[list[Write], Change]:
    """The same for one parameter, where something is there already: the views get its values."""
    change = Change(optimizer.state[p], {}, [])
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
        initial = partial(optimizer.initial_value, group, role)
        values = converted(role, form, here, local(p), place.strides, initial) if parts else []
        for (key, part), value in zip(parts.items(), values):
            view = change.new[key] = place.open(key, part.dtype, part.per)
            writes.append((local(view), value))
        change.gone.extend(superseded(role, form, here, local(p)))
    return writes, change


def count_aside(optimizer: Any, p: Tensor, place: Place, stored: Storage, taken: int) -> list[Write]:
    """Make the place count steps where torch does not, so that the device knows a first step from others. Goes before
    the states. Returns what has to be written."""
    state = optimizer.state.get(p, {})
    if "step" in place.views and all(place.holds(key, state.get(key)) for key in stored.state_keys):
        return []
    return [(place.open_number("step", torch.float32), float(taken))]


def write(optimizer: Any, writes: list[tuple[Tensor, Tensor | float]]) -> None:
    """Fill views. Where states were exchanged, a value may be one of the views, and a view may still be the state
    of another parameter: both are copied before anything is overwritten."""
    views = {view.data_ptr(): view for view, _ in writes if view.numel()}
    writes = [(v, x.clone() if isinstance(x, Tensor) and x.data_ptr() in views else x) for v, x in writes]
    for state in optimizer.state.values() if any(isinstance(x, Tensor) for _, x in writes) else ():
        for key, value in state.items() if isinstance(state, dict) else ():
            part = local(value)
            if isinstance(part, Tensor) and part is not views.get(part.data_ptr(), part):
                state[key] = value.clone()
    for view, value in writes:
        view.copy_(value) if isinstance(value, Tensor) else view.fill_(value)


def flatten(places: list[Place], params: list[Tensor], wanted: bool) -> bool:
    """Move parameters into their space's buffer, and let go those that somebody else moved away. True if
    all of them are there, in one space."""
    for p, place in zip(params, places):
        if place.flattened is not None and p.data_ptr() != place.flattened:
            place.flattened = None
        elif wanted and place.flattened is None and "param" not in place.views and (place.owned or owns_memory(p)):
            view = place.open("param", p.dtype)
            view.copy_(p.detach())
            p.data = view
            place.flattened = p.data_ptr()
    return len({id(place.space) for place in places}) == 1 and all(place.flattened is not None for place in places)


def owns_memory(p: Tensor) -> bool:
    """Whether ``p`` is a plain dense tensor whose storage holds nothing else and is nobody else's."""
    if type(p) not in (Tensor, torch.nn.Parameter) or hasattr(p, "_fsdp_flattened") or not is_dense(p):
        return False
    if p.is_cpu and p.is_shared():
        return False
    storage = p.untyped_storage()
    # Memory of NumPy or of a file cannot be resized. Two uses: p and this handle.
    uses = torch._C._storage_Use_Count(storage._cdata)
    return storage.resizable() and storage.nbytes() == p.numel() * p.itemsize and uses == 2
