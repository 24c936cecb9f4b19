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
    """``members`` are those that share all their numbers."""
    ways = Ways([], [], [])
    lists = bucket.listed or (bucket.passing and bucket.fused) or len(members) == 1
    alone = ways.listed if settings.needs_norm and not bucket.passing else ways.direct
    for m in members:
        if not m.place.packed:
            ways.direct.append(m)
        elif m.place.flattened is not None or not (lists and is_dense(m.param)):
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


SHORTEST = 8
"""A row of fewer is not worth a call of its own."""


def rows_and_others(members: list[Member]) -> tuple[list[list[Member]], list[Member]]:
    """Rows of neighbours whose shapes differ in the first dimension only: one concatenation serves them, which is three
    times faster than copying one by one. And the others, for one list copy."""
    rows: list[list[Member]] = []
    others: list[Member] = []
    members = sorted(members, key=lambda m: (id(m.place.space), m.place.index))
    for _, alike in groupby(enumerate(members), key=_row_key):
        row = [m for _, m in alike]
        first = row[0].place
        if len(row) < SHORTEST or not first.space.sizes[first.index] or not all(m.param.is_contiguous() for m in row):
            others += row
        else:
            rows.append(row)
    return rows, others


def row_copy(row: list[Member], role: str, dtype: torch.dtype) -> Tensor:
    """The memory into which a row is concatenated."""
    space, first, last = row[0].place.space, row[0].place.index, row[-1].place.index
    part = space.packed_copies(role, dtype)[space.offsets[first] : space.end(last)]
    return part.view(-1, *space.sizes[first][1:])


class Gather:
    """Copies gradients into scratch buffers."""

    def __init__(self, members: list[Member], dtype: torch.dtype):
        rows, others = rows_and_others(members)
        self.rows = [(picker([m.position for m in row]), row_copy(row, "grad", dtype)) for row in rows]
        self.views = [m.place.packed_copy("grad", dtype) for m in others]
        self.pick = picker([m.position for m in others])

    def __call__(self, grads: Sequence[Tensor | None]) -> None:
        for pick, row in self.rows:
            torch.cat(pick(grads), out=row)
        if self.views:
            torch._foreach_copy_(self.views, self.pick(grads))


class Staging:
    """Copies parameters into scratch buffers, and back when they are updated."""

    def __init__(self, members: list[Member], dtype: torch.dtype):
        rows, others = rows_and_others(members)
        self.rows = [([m.param for m in row], row_copy(row, "param", dtype)) for row in rows]
        self.others = [m.param for m in others]
        self.views = [m.place.packed_copy("param", dtype) for m in others]
        self.params = [m.param for m in members]
        self.copies = [m.place.packed_copy("param", dtype) for m in members]

    def fetch(self) -> None:
        for params, row in self.rows:
            torch.cat(params, out=row)
        if self.others:
            torch._foreach_copy_(self.views, self.others)

    def put_back(self) -> None:
        if self.params:
            torch._foreach_copy_(self.params, self.copies)


def neighbours(members: list[Member]) -> list[list[Member]]:
    """Every unbroken row of members in memory."""
    rows: list[list[Member]] = []
    for m in sorted(members, key=lambda m: (id(m.place.space), m.place.index)):
        if rows and _adjoin(rows[-1][-1], m):
            rows[-1].append(m)
        else:
            rows.append([m])
    return rows


def _adjoin(a: Member, b: Member) -> bool:
    return (
        a.place.space is b.place.space
        and a.place.index + 1 == b.place.index
        and (a.place.flattened is None) == (b.place.flattened is None)
    )


def _row_key(numbered: tuple[int, Member]) -> tuple:
    """The same for members that stand next to each other in memory and can be concatenated."""
    number, m = numbered
    return id(m.place.space), m.place.index - number, len(m.param.shape), m.param.shape[1:]
