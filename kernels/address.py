"""Where the data is: ``address(record, roles, ALIGNED) -> Tensors`` for the tensor of one record.

The table has one record of int64 fields per tensor::

    numel, row of hyperparameters, aligned or not, first draw, gradient, parameter, states ..., averages ...

A role is stored in one part or more, as its form needs (rounding.py); each part has a field, in that order. Gradients
always are addresses, since autograd owns them. With ``scattered`` every other part is an address too; with ``flat``
the parameter's field holds the position in flat buffers, one per part.

Tensors are cut into tiles. Their table has two int32 numbers for each: the tensor, and the tile's first element in it
by GRAIN.
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
    """(tensor, first element) of a tile of BLOCK elements"""
    tensor = tl.load(tiles + 2 * number).to(tl.int64)
    return tensor, tl.multiple_of(tl.load(tiles + 2 * number + 1).to(tl.int64) * GRAIN, BLOCK)


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
