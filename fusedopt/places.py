"""Where the state of each parameter lives, and how it got there.

``optimizer.state[p]`` holds views of flat spaces. What somebody else put there (a loaded checkpoint, a
tensor of their own) is copied in; only memory shared between processes is used as it is.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .cohorts import Scalar
from .flat import Space, alias, is_dense
from .shards import local
from .storage import Part, Storage, converted, part_key, superseded


@dataclasses.dataclass(slots=True, eq=False)
class Place:
    """Where one parameter's state lives."""

    space: Space
    index: int
    packed: bool
    views: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    addresses: dict[str, int] = dataclasses.field(default_factory=dict)
    """Where the views lay when they were made."""
    copies: dict[tuple[str, torch.dtype], Tensor] = dataclasses.field(default_factory=dict)
    """Views of the space's packed copies."""
    flattened: int | None = None
    """The address to which ``flatten`` moved the parameter, until somebody else moves it."""
    owned: bool = False
    """Whether the parameter's memory is an earlier place's, and so may be moved again."""
    like: Tensor | None = None
    """The distributed parameter: its states are distributed like it, each in memory of its own."""

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
        if key not in self.space.buffers:
            self.space.allocate(key, dtype, per)
        return self.keep(key, alias(self.space.view(key, self.index)))

    def open_number(self, key: str, dtype: torch.dtype) -> Tensor:
        """A view of this parameter's number among those of ``key``, with storage of its own."""
        if key not in self.space.numbers:
            self.space.allocate_numbers(key, dtype)
        return self.keep(key, alias(self.space.view(key, self.index)))

    def keep(self, key: str, view: Tensor) -> Tensor:
        self.views[key] = view
        self.addresses[key] = view.data_ptr()
        return view

    def holds(self, key: str, value: Any) -> bool:
        """Whether ``value`` is this place's view, still where it was made."""
        part = local(value)
        return part is not None and part is self.views.get(key) and part.data_ptr() == self.addresses[key]

    def packed_copy(self, role: str, dtype: torch.dtype) -> Tensor:
        copy = self.copies.get((role, dtype))
        if copy is None:
            copy = self.space.part_like(self.space.packed_copies(role, dtype), self.index)
            self.copies[role, dtype] = copy
        return copy

    def fits(self, p: Tensor, parts: dict[str, Part], numbers: dict[str, Scalar], packed: bool) -> bool:
        space, i = self.space, self.index
        if (space.device, space.dtype, space.sizes[i]) != (p.device, p.dtype, p.size()) or packed < self.packed:
            return False
        if is_dense(p):
            if space.strides[i] != p.stride():
                return False
        elif packed and not self.packed:
            return False
        buffers = {**space.buffers, **space.numbers}
        return all(buffers[key].dtype == x.dtype for key, x in {**parts, **numbers}.items() if key in buffers)


def has_shared_state(optimizer: Any, p: Tensor, place: Place | None) -> bool:
    """Whether a state lies in memory shared between processes, as Adagrad.share_memory() puts it."""
    return any(
        is_shared(value)
        for key, value in optimizer.state.get(p, {}).items()
        if place is None or not place.holds(key, value) or not place.packed
    )


def is_shared(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_cpu and value.is_shared()


def adopt_states(
    optimizer: Any, p: Tensor, group: dict, place: Place, stored: Storage, numbers: dict[str, Scalar]
) -> list[tuple[Tensor, Tensor | float]]:
    """Make ``optimizer.state[p]`` hold views of the place. Returns what has to be written into them. ``numbers`` are
    the step count, where there is one, and the rule's scalars."""
    if not numbers and not stored.parts:
        return []
    state = optimizer.state[p]
    writes = []
    for key, number in numbers.items():
        if not place.holds(key, state.get(key)):
            view = state[key] = place.open_number(key, number.dtype)
            writes.append((view, number.value))
    for role, form in (("", stored.param), *stored.kept):
        parts = {part_key(role, part): part for part in form.parts}
        parts.pop("", None)
        if parts and all(place.holds(key, state.get(key)) for key in parts):
            continue
        here = {key: local(value) for key, value in state.items()}
        value = here.get(role)
        if form.plain and is_shared(value) and not place.packed:
            place.keep(role, value)
            continue
        initial = partial(optimizer.initial_value, group, role)
        values = converted(role, form, here, local(p), place.strides, initial) if parts else []
        for (key, part), value in zip(parts.items(), values):
            state[key] = place.open(key, part.dtype, part.per)
            writes.append((local(state[key]), value))
        for key in superseded(role, form, here, local(p)):
            del state[key]
    return writes


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
