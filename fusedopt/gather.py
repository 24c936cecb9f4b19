"""Small gradients and parameters side by side, so that few operations serve them all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .buckets import Bucket, Member
from .flat import is_dense
from .settings import Settings


class Ways(NamedTuple):
    """How parameters come to the calls that update them."""

    joined: list[Member]
    """Side by side in buffers, gradients too; copied there, or there for good."""
    listed: list[Member]
    """Where they are, with gradients in a buffer."""
    direct: list[Member]
    """Where they are, with gradients where those are."""


def find_ways(bucket: Bucket, members: Sequence[Member], settings: Settings) -> Ways:
    """How some members of a bucket, which share all their numbers, come to their calls."""
    ways = Ways([], [], [])
    lists = bucket.listed or (bucket.passing and bucket.fused) or len(members) == 1
    alone = ways.listed if settings.needs_norm and not bucket.passing else ways.direct
    # Without states the kernel is through its lists sooner than gradients could be copied.
    apart = bucket.listed and alone is ways.direct and not bucket.rule.states
    for m in members:
        if not m.place.packed:
            ways.direct.append(m)
        elif (m.place.flattened is not None and not apart) or not (lists and is_dense(m.param)):
            ways.joined.append(m)
        else:
            alone.append(m)
    return ways


def picker(positions: Sequence[int]) -> Callable[[Sequence[Any]], list[Any]]:
    """A function that makes a list of what stands at these positions."""
    if list(positions) == list(range(len(positions))):
        return itemgetter(slice(len(positions)))
    if len(positions) == 1:
        return lambda items: [items[positions[0]]]
    pick = itemgetter(*positions)
    return lambda items: list(pick(items))


def each_once(grads: list[Tensor]) -> list[Tensor]:
    """The same gradients, with copies of those that stand there again: what is clipped where it is must be clipped
    once. torch's guards tell when to look (``Layouts``)."""
    if len(set(map(id, grads))) == len(grads):
        return grads
    seen: set[int] = set()
    return [g.clone() if id(g) in seen or seen.add(id(g)) else g for g in grads]


def in_layout_of(member: Member, g: Tensor) -> Tensor:
    """The gradient in its parameter's layout: torch's fused kernels pair elements by memory, and are
    silently wrong where the two differ."""
    space, index = member.place.space, member.place.index
    if g.stride() == space.strides[index]:
        return g
    return torch.empty_strided(space.sizes[index], space.strides[index], dtype=g.dtype, device=g.device).copy_(g)


class Picked:
    """Takes the gradients of some members from those of a step: each once, in its parameter's layout."""

    def __init__(self, members: Sequence[Member]):
        self.members = members
        self.pick = picker([m.position for m in members])
        self.strides = [m.place.strides for m in members]
        self.in_layout = False
        """Whether gradients that are laid out as at the first step have their parameters' layout."""

    def __call__(self, grads: Sequence[Tensor | None], as_planned: bool) -> list[Tensor]:
        """``as_planned``: whether they are laid out as at the first step."""
        found = self.pick(grads)
        if as_planned and self.in_layout:
            return found
        found = each_once(found)
        in_layout = list(map(Tensor.stride, found)) == self.strides
        self.in_layout = as_planned and in_layout
        return found if in_layout else [in_layout_of(m, g) for m, g in zip(self.members, found)]


class Gather:
    """Copies tensors of parameters into scratch buffers: rows of neighbours whose shapes differ in the first dimension
    only by one concatenation, which is three times faster than copying one by one; the others by one list copy."""

    SHORTEST = 8
    """A row of fewer is not worth a call of its own."""

    def __init__(self, members: list[Member], role: str, dtype: torch.dtype, positions: Sequence[int]):
        """``positions`` say where, among what it will be given, the members' tensors stand."""
        self.rows: list[tuple[Callable[[Sequence[Any]], list[Any]], Tensor]] = []
        others: list[int] = []
        self.views: list[Tensor] = []
        placed = sorted(zip(members, positions), key=lambda pair: (id(pair[0].place.space), pair[0].place.index))
        for _, alike in groupby(enumerate(placed), key=_row_key):
            row, stand = zip(*(pair for _, pair in alike))
            space, first, last = row[0].place.space, row[0].place.index, row[-1].place.index
            if len(row) < self.SHORTEST or not space.sizes[first] or not all(m.param.is_contiguous() for m in row):
                others += stand
                self.views += [m.place.packed_copy(role, dtype) for m in row]
            else:
                part = space.packed_copies(role, dtype)[space.offsets[first] : space.end(last)]
                self.rows.append((picker(stand), part.view(-1, *space.sizes[first][1:])))
        self.pick = picker(others)

    def __call__(self, tensors: Sequence[Tensor | None]) -> None:
        for pick, row in self.rows:
            torch.cat(pick(tensors), out=row)
        if self.views:
            torch._foreach_copy_(self.views, self.pick(tensors))


class Staging:
    """Copies parameters into scratch buffers, and back when they are updated."""

    def __init__(self, members: list[Member], dtype: torch.dtype):
        self.params = [m.param for m in members]
        self.copies = [m.place.packed_copy("param", dtype) for m in members]
        self.gather = Gather(members, "param", dtype, range(len(members)))

    def fetch(self) -> None:
        self.gather(self.params)

    def put_back(self) -> None:
        if self.params:
            torch._foreach_copy_(self.params, self.copies)


def neighbours(members: list[Member], most: float) -> list[list[Member]]:
    """Unbroken rows of members in memory, of at most so many elements or of one member."""
    rows: list[list[Member]] = []
    size = 0
    for m in sorted(members, key=lambda m: (id(m.place.space), m.place.index)):
        size += m.param.numel()
        if rows and _adjoin(rows[-1][-1], m) and size <= most:
            rows[-1].append(m)
        else:
            rows.append([m])
            size = m.param.numel()
    return rows


def _adjoin(a: Member, b: Member) -> bool:
    return (
        a.place.space is b.place.space
        and a.place.index + 1 == b.place.index
        and (a.place.flattened is None) == (b.place.flattened is None)
    )


def _row_key(numbered: tuple[int, tuple[Member, int]]) -> tuple:
    """The same for members that stand next to each other in memory and can be concatenated."""
    number, (m, _) = numbered
    return id(m.place.space), m.place.index - number, len(m.param.shape), m.param.shape[1:]
