"""Adaptive gradient clipping: a number for every unit of a parameter, by one launch before the update.

A unit is what belongs to one index of a parameter's first dimension, an output row or filter; scalars and vectors are
one unit each. Its number is clipping max(|p|, eps) / |g| with the norms of the unit: the update multiplies the gradient
by that, or by the factor of everything else if that is smaller, which is

    g <- min(1, clipping max(|p|, eps) / |factor g|) factor g

In memory the elements of a unit lie in pieces of ``stride`` elements, one in every ``stride * count``: in one piece
unless the parameter is transposed.

Each program adds the squares of a part of one unit in float64, lane by lane. The last of a unit's programs to finish
adds the parts up in a fixed order.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .address import NUMEL
from .arithmetic import divide

# The fields of a program: tensor, unit within the tensor, part of the unit, how many parts it has.
PART_FIELDS = tl.constexpr(4)

# The fields of a tensor: its first unit among all, the stride of its first dimension, how many units it has.
UNIT_FIELDS = tl.constexpr(3)

PARTIALS = tl.constexpr(128)
"""Parts of a unit that are added at once."""


class Units(NamedTuple):
    """Those of all tensors of a bucket."""

    ratios: object  # COMPUTE [units]
    table: object  # int64 [tensors, UNIT_FIELDS]


class UnitsOfTensor(NamedTuple):
    ratios: object
    stride: object
    count: object


@triton.jit(do_not_specialize=["clipping", "eps"])
def ratios_of_units(
    table,  # int64 [tensors, FIELDS]: see address.py
    units,  # Units
    parts,  # int32 [programs, PART_FIELDS]
    partials,  # float64 [programs, 2]
    tickets,  # int32 [units], zero between launches
    clipping: tl.float64,
    eps: tl.float64,
    roles,
    ADDRESS: tl.constexpr,
    FIELDS: tl.constexpr,
    PART: tl.constexpr,  # elements of a part
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    tensor = tl.load(parts + program * PART_FIELDS).to(tl.int64)
    index = tl.load(parts + program * PART_FIELDS + 1).to(tl.int64)
    part = tl.load(parts + program * PART_FIELDS + 2).to(tl.int64)
    programs = tl.load(parts + program * PART_FIELDS + 3)

    record = table + tensor * FIELDS
    of = of_tensor(units, tensor)
    size = tl.load(record + NUMEL) // of.count
    t = ADDRESS(record, roles, False)
    g_squares, p_squares = tl.zeros((BLOCK,), tl.float64), tl.zeros((BLOCK,), tl.float64)
    for at in tl.range(part * PART, tl.minimum((part + 1) * PART, size), BLOCK):
        k = tl.cast(at, tl.int64) + tl.arange(0, BLOCK)
        places = index * of.stride + k
        if of.stride != size:
            places = index * of.stride + k // of.stride * (of.stride * of.count) + k % of.stride
        g = tl.load(t.grad + places, mask=k < size, other=0.0).to(tl.float64)
        p = tl.load(t.param[0] + places, mask=k < size, other=0.0).to(tl.float64)
        g_squares += g * g
        p_squares += p * p
    g_square, p_square = tl.sum(g_squares), tl.sum(p_squares)

    finished = programs == 1
    if programs > 1:
        tl.store(partials + 2 * program, g_square)
        tl.store(partials + 2 * program + 1, p_square)
        # Acquire and release: the unit's last program sees the others' sums.
        ticket = tickets + tl.load(units.table + tensor * UNIT_FIELDS) + index
        if tl.atomic_add(ticket, 1, sem="acq_rel", scope="gpu") == programs - 1:
            tl.store(ticket, 0)
            finished = True
            g_square = total(partials, program - part, programs, 0)
            p_square = total(partials, program - part, programs, 1)
    if finished:
        limit = clipping * tl.maximum(tl.sqrt(p_square), eps, propagate_nan=tl.PropagateNan.ALL)
        tl.store(of.ratios + index, (limit / tl.sqrt(g_square)).to(of.ratios.dtype.element_ty))


@triton.jit
def total(partials, first, programs, COLUMN: tl.constexpr):
    sums = tl.zeros((PARTIALS,), tl.float64)
    for at in tl.range(0, programs, PARTIALS):
        places = at + tl.arange(0, PARTIALS)
        # .cg: other programs of this launch wrote them; L1 may hold older values.
        pointers = partials + 2 * (first + places) + COLUMN
        sums += tl.load(pointers, mask=places < programs, other=0.0, cache_modifier=".cg")
    return tl.sum(sums)


@triton.jit
def of_tensor(units, tensor):
    fields = units.table + tensor * UNIT_FIELDS
    return UnitsOfTensor(units.ratios + tl.load(fields), tl.load(fields + 1), tl.load(fields + 2))


@triton.jit
def scaled(g, factor, units, span):
    """g times the factor, or times its unit's number if that is smaller; either may be None."""
    if units is not None:
        ratio = ratios_of(units, span)
        largest = 1.0
        if factor is not None:
            largest = factor
        g = g * tl.minimum(ratio, largest, propagate_nan=tl.PropagateNan.ALL)
    elif factor is not None:
        g = g * factor
    return g


@triton.jit
def ratios_of(units, span):
    """The number of each element's unit."""
    lanes = tl.arange(0, span.mask.shape[0])
    # 64-bit numbers for the first element only: a division of those takes a hundred instructions.
    until_next = tl.minimum(units.stride - span.first % units.stride, 1 << 30).to(tl.int32)
    first = (span.first // units.stride % units.count).to(tl.int32)
    count = units.count.to(tl.int32)
    steps = tl.where(lanes < until_next, 0, 1 + quotient(lanes - until_next, units.stride))
    # Behind the last unit of a transposed parameter comes the first again.
    beyond = first - count + steps
    beyond -= quotient(beyond, units.count) * count
    return tl.load(units.ratios + tl.where(beyond < 0, first + steps, beyond), mask=span.mask, other=1.0)


@triton.jit
def quotient(x, divisor):
    """x // divisor for numbers from 0 to the lanes of a tile; 0 for those below. In float32, where half a number more
    is farther from the next quotient than all roundings together reach."""
    inverse = divide(tl.full((), 1.0, tl.float32), divisor.to(tl.float32))
    return ((tl.maximum(x, 0).to(tl.float32) + 0.5) * inverse).to(tl.int32)
