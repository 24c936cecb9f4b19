"""Where the data is: ``address(record, roles, ALIGNED) -> Tensors`` for the tensor of one record.

The table has one record of int64 fields per tensor::

    numel, row of hyperparameters, aligned or not, first draw, gradient, parameter, states ..., averages ...

A role is stored in one part or more, as its form needs (rounding.py); each part has a field, in that order. Gradients
always are addresses, since autograd owns them. With ``scattered`` every other part is an address too; with ``flat``
the parameter's field holds the position in flat buffers, one per part.

Tensors are cut into tiles. Their table has TILE_FIELDS int32 numbers for each: the tensor, the tile's first element in
it by GRAIN, how many elements it has, and one that nobody reads: a tile's place is then a multiple of a power of two,
which takes fewer instructions.
"""

from typing import NamedTuple

import triton
import triton.language as tl

NUMEL = tl.constexpr(0)
ROW = tl.constexpr(1)
IS_ALIGNED = tl.constexpr(2)
DRAW = tl.constexpr(3)
GRAD = tl.constexpr(4)
PARAM = tl.constexpr(5)


TILE_FIELDS = tl.constexpr(4)

GRAIN = tl.constexpr(256)
"""Every tile begins at a multiple of so many elements, and every tensor in a flat buffer."""


class Tensors(NamedTuple):
    grad: object
    param: tuple  # of parts
    states: tuple  # of tuples of parts
    averages: tuple


class Role(NamedTuple):
    """One part of ``scattered`` tensors: the field of its address, and its dtype."""

    field: object
    dtype: object
    per: object  # elements of the parameter for each of its own


class Base(NamedTuple):
    """One part of ``flat`` tensors: the whole buffer."""

    pointer: object
    per: object


@triton.jit
def tile_at(tiles, number, BLOCK: tl.constexpr):
    """(tensor, first element, elements) of a tile, which has BLOCK of them unless it is the tensor's last"""
    tile = tiles + TILE_FIELDS * tl.cast(number, tl.int64)
    tensor, start = tl.load(tile).to(tl.int64), tl.load(tile + 1).to(tl.int64) * GRAIN
    return tensor, tl.multiple_of(start, BLOCK), tl.load(tile + 2)


@triton.jit
def scattered(record, roles, ALIGNED: tl.constexpr):
    return Tensors(
        at(record, roles.grad, ALIGNED),
        tl.tuple([at(record, part, ALIGNED) for part in roles.param]),
        tl.tuple([tl.tuple([at(record, part, ALIGNED) for part in parts]) for parts in roles.states]),
        tl.tuple([tl.tuple([at(record, part, ALIGNED) for part in parts]) for parts in roles.averages]),
    )


@triton.jit
def flat(record, roles, ALIGNED: tl.constexpr):
    position = tl.multiple_of(tl.load(record + PARAM), GRAIN)
    return Tensors(
        at(record, roles.grad, ALIGNED),
        tl.tuple([behind(part, position) for part in roles.param]),
        tl.tuple([tl.tuple([behind(part, position) for part in parts]) for parts in roles.states]),
        tl.tuple([tl.tuple([behind(part, position) for part in parts]) for parts in roles.averages]),
    )


@triton.jit
def behind(base, position):
    return base.pointer + position // base.per


@triton.jit
def at(record, role, ALIGNED: tl.constexpr):
    pointer = tl.load(record + role.field).to(tl.pointer_type(role.dtype))
    # One number for many elements may lie anywhere.
    if ALIGNED and role.per == 1:
        pointer = tl.multiple_of(pointer, 16)
    return pointer
