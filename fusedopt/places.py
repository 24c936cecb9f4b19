"""Where the state of each parameter lives: ``optimizer.state[p]`` holds views of flat spaces."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from operator import is_
from typing import Any

import torch
from torch import Tensor

from .cohorts import Scalar
from .flat import Space, is_dense
from .rule import Rule
from .settings import Settings
from .shards import PLAIN, is_piece, local
from .storage import Part
from .upload import free_later


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
    adoption: tuple | None = None
    """The ``adoption_key`` under which the state was adopted; None as long as it was not."""
    keys: Sequence[str] = ()
    """The keys of the state that was adopted then."""
    lent: dict[str, tuple] = dataclasses.field(default_factory=dict)
    """What tells whether tensors are the views of these keys that were let go."""

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

    def memory(self, key: str) -> Tensor:
        """What the view ``key`` shows, for who keeps other tensors of that memory: they must not keep the view's own
        storage alive, or nobody would notice that the view was given another (``Space.storages``)."""
        view = self.views[key]
        inside = self.space.view(key, self.index) if key in self.space.buffers else view
        return inside if inside.data_ptr() == view.data_ptr() else view

    def keep(self, key: str, view: Tensor) -> Tensor:
        self.views[key] = view
        self.addresses[key] = view.data_ptr()
        return view

    def holds(self, key: str, value: Any) -> bool:
        """Whether ``value`` is this place's view, still where it was made."""
        part = local(value)
        return part is not None and part is self.views.get(key) and part.data_ptr() == self.addresses[key]

    def lend(self) -> None:
        """Hold the views of the state no longer, nor the buffers below them, but for the numbers."""
        self.space.lend(self.keys)
        for key in self.keys:
            if key in self.views and key not in self.space.numbers:
                self.lent[key] = _whereabouts(self.views.pop(key))

    def take_back(self, state: Any) -> bool:
        """Hold those again that the state still has, where they were. Whether it has all."""
        self.space.take_back()
        state = state if isinstance(state, dict) else {}
        for key, there in self.lent.items():
            part = local(state.get(key))
            in_memory = self.like is not None or key in self.space.buffers
            if in_memory and isinstance(part, Tensor) and _whereabouts(part) == there:
                self.views[key] = part
        self.lent = {}
        return all([self.holds(key, state.get(key)) for key in self.keys])

    def without_gaps(self) -> Tensor:
        """New memory for the parameter, without gaps between its elements."""
        space, i = self.space, self.index
        return torch.empty_strided(space.sizes[i], space.strides[i], dtype=space.dtype, device=space.device)

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
        if self.space.capturable != capturable or not self.is_for(p):
            return False
        buffers = self.space.buffers | self.space.numbers
        return all(buffers[key].dtype == x.dtype for key, x in parts.items() if key in buffers)

    def settle(self, adoption: tuple, keys: Sequence[str]) -> None:
        """Note how the state was adopted, and under which keys it is."""
        self.adoption, self.keys = adoption, keys

    def is_settled(self, p: Tensor, state: dict[str, Any], adoption: tuple) -> bool:
        """Whether the parameter and its state are as they were when ``settle`` noted the same adoption."""
        if self.adoption != adoption or len(state) != len(self.keys) or not self.is_for(p):
            return False
        values, held = map(state.get, self.keys), list(map(self.views.get, self.keys))
        if self.like is not None:
            values = map(local, values)
        at = list(map(self.addresses.get, self.keys))
        return all(map(is_, values, held)) and list(map(Tensor.data_ptr, held)) == at


def _whereabouts(tensor: Tensor) -> tuple:
    return tensor.data_ptr(), tensor.dtype, tensor.device, tensor.size(), tensor.stride()


@contextlib.contextmanager
def finished(places: dict[Tensor, Place]) -> Iterator[None]:
    """Drop the places that are not finished where something interrupts the planning."""
    try:
        yield
    except BaseException:
        for p in [p for p, place in places.items() if place.adoption is None]:
            del places[p]
        raise


def adoption_key(rule: Rule, settings: Settings, capturable: bool) -> tuple:
    """What decides how a state is adopted, besides the parameter and the state themselves."""
    return rule, settings.layout, capturable


def flatten(places: list[Place], params: list[Tensor], wanted: bool) -> bool:
    """Move parameters into their space's buffer, and let go those that somebody else moved away. True if
    all of them are there, in one space."""
    for p, place in zip(params, places):
        if place.flattened is not None and p.data_ptr() != place.flattened:
            place.flattened = None
        elif wanted and place.flattened is None and "param" not in place.views and (place.owned or owns_memory(p)):
            view = place.open("param", p.dtype)
            view.copy_(p.detach())
            free_later(p)
            p.data = view
            place.flattened = p.data_ptr()
    return len({place.space for place in places}) == 1 and all(place.flattened is not None for place in places)


def is_shared(value: Any) -> bool:
    """Whether it is a tensor in memory that processes share."""
    return isinstance(value, Tensor) and value.is_cpu and value.is_shared()


def owns_memory(p: Tensor) -> bool:
    """Whether ``p`` is a plain dense tensor whose storage holds nothing else and is nobody else's."""
    if type(p) not in PLAIN or is_piece(p) or is_shared(p) or not is_dense(p):
        return False
    storage = p.untyped_storage()
    # Memory of NumPy or of a file cannot be resized. Two uses: p and this handle.
    uses = torch._C._storage_Use_Count(storage._cdata)
    return storage.resizable() and storage.nbytes() == p.numel() * p.itemsize and uses == 2
