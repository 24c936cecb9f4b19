"""The one optimizer kernel: load -> gradient chain -> rule -> update chain -> averages -> round and store.

A tile is at most BLOCK elements of one tensor; one program updates one tile. ``rows`` holds one row
of numbers per (parameter group, step count): the learning rate, the rule's ``h``, the stages'
arguments, the averages' weights. Nothing that changes during training is a compile-time constant.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .address import DRAW, IS_ALIGNED, ROW, tile_at
from .norm import FACTOR, NONFINITE, SKIPPED
from .philox import Draw
from .rounding import read, span_of, whole_span, widened
from .stages import arguments_of, columns, loaded, through, through_with_means
from .tally import with_gradient, with_step
from .units import of_tensor, scaled


class Numbers(NamedTuple):
    """Where those of a row stand, by who needs them: each is loaded where it is used, or it would take a register for
    long."""

    lr: object
    h: tuple
    on_grad: tuple  # the arguments of each stage
    on_update: tuple
    averages: tuple


def named(kernel):
    """A kernel's name in profiles and caches: with the rule that it was compiled for."""
    return lambda specialization: f"{kernel}_{specialization.constants['RULE'].__name__}"


@triton.jit(repr=named("step"), do_not_specialize=["known_skips", "variants", "seed"])
def step(
    table,  # int64 [tensors, FIELDS]: see address.py
    tiles,  # int32 [programs, TILE_FIELDS]: see address.py
    rows,  # COMPUTE [cohorts, variants, WIDTH]
    means,  # float64 [tensors, MEANS] of means.py, or None: no stage needs one
    verdict,  # float64 [4] of norm.judge, or None: nothing scales or skips
    known_skips: tl.int32,  # skipped steps that the host knew of when it wrote the rows
    variants: tl.int32,  # rows per cohort, one per number of skips that it may not know of
    seed: tl.int64,  # of the random bits
    units,  # Units of units.py, or None: no gradient is clipped by units
    roles,
    forms,  # how each role is stored: see rounding.py
    h,
    on_grad,
    on_update,
    averages,  # the columns of the averages' weights
    RULE: tl.constexpr,
    ADDRESS: tl.constexpr,
    COMPUTE: tl.constexpr,
    FIELDS: tl.constexpr,
    MEANS: tl.constexpr,
    WIDTH: tl.constexpr,
    GRANULE: tl.constexpr,  # elements that must be updated together
    DRAWS: tl.constexpr,  # whether a form needs random bits; the row's last number is then the step
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    skip, late = heed(verdict, known_skips, variants)
    if skip != 0:
        tensor, start, length = tile_at(tiles, program, BLOCK)
        look_at_tiles(table, tensor, start, length, roles, forms, (), ADDRESS, COMPUTE, FIELDS, BLOCK)
        return
    factor = None
    if verdict is not None:
        factor = tl.load(verdict + FACTOR).to(COMPUTE)
        # The gradients that the norm was told last still lie in the second-level cache.
        program = tl.num_programs(0) - 1 - program
    tensor, start, length = tile_at(tiles, program, BLOCK)
    update_tiles(
        table, tensor, start, length, rows, means, factor, units, late, variants, seed, roles, forms, h, on_grad,
        on_update, averages, (), RULE, ADDRESS, COMPUTE, FIELDS, MEANS, WIDTH, GRANULE, DRAWS, BLOCK, 0, True,
    )  # fmt: skip


@triton.jit
def heed(verdict, known_skips, variants):
    """What the verdict says, if there is one: (whether to skip, the late skips)"""
    # Not the factor too, which may be None: Triton 3.6 has no tuples that hold it.
    if verdict is None:
        return 0, 0
    else:
        return tl.load(verdict + NONFINITE), late_skips(tl.load(verdict + SKIPPED), known_skips, variants)


@triton.jit
def late_skips(skipped, known_skips, variants):
    """How many of the skipped steps the host did not know of when it wrote the rows."""
    # Rows that the device computes are right already: there is one for each.
    return tl.minimum(skipped.to(tl.int32) - known_skips, variants - 1)


@triton.jit
def update_tiles(
    table, tensor, start, length, rows, means, factor, units, late, variants, seed, roles, forms, h, on_grad, on_update,
    averages, sums, RULE: tl.constexpr, ADDRESS: tl.constexpr, COMPUTE: tl.constexpr, FIELDS: tl.constexpr,
    MEANS: tl.constexpr, WIDTH: tl.constexpr, GRANULE: tl.constexpr, DRAWS: tl.constexpr, BLOCK: tl.constexpr,
    LANES: tl.constexpr, ONE: tl.constexpr,
):  # fmt: skip
    """The tiles of the ``length`` elements from ``start`` on, the last first; or ONE tile. Returns ``sums``, of LANES
    lanes or none, with their squares: see tally.py."""
    record = table + tensor * FIELDS
    row = row_of(record, rows, late, variants, WIDTH)
    if means is not None:
        means += tensor * MEANS
    if units is not None:
        units = of_tensor(units, tensor)
    draw = None
    if DRAWS:
        draw = Draw(seed, tl.load(row + WIDTH - 1).to(tl.int32), tl.load(record + DRAW))
    if ONE:
        sums = update_tile(
            record, start, length, row, means, factor, units, draw, roles, forms, h, on_grad, on_update, averages,
            sums, RULE, ADDRESS, COMPUTE, GRANULE, BLOCK, LANES,
        )  # fmt: skip
    else:
        # Addresses and the row's numbers are loaded again for each tile, which costs less than the registers.
        while length > 0:
            first = (length - 1) & -BLOCK
            at_tile = tl.multiple_of(start + first, BLOCK)
            sums = update_tile(
                record, at_tile, length - first, row, means, factor, units, draw, roles, forms, h, on_grad, on_update,
                averages, sums, RULE, ADDRESS, COMPUTE, GRANULE, BLOCK, LANES,
            )  # fmt: skip
            length = first
    return sums


@triton.jit
def update_tile(
    record, start, valid, row, means, factor, units, draw, roles, forms, h, on_grad, on_update, averages, sums,
    RULE: tl.constexpr, ADDRESS: tl.constexpr, COMPUTE: tl.constexpr, GRANULE: tl.constexpr,
    BLOCK: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """``valid`` elements."""
    # Only whole groups of GRANULE elements of aligned tensors can be loaded as vectors: a mask at an
    # arbitrary element, or an address that is no multiple of 16 bytes, would make every load scalar.
    # The rest goes one element per thread, which at least keeps neighbours together.
    is_aligned = tl.load(record + IS_ALIGNED).to(tl.int32) != 0
    vectors = tl.multiple_of(tl.where(is_aligned, valid & -GRANULE, 0), GRANULE)
    # Where nothing was stored yet, AMD's compiler knows that all threads load the same addresses.
    aligned = ADDRESS(record, roles, True)
    # The rest first: what else it needs does not have to be kept while the vectors take the registers.
    if vectors < valid:
        tensors, numbers = ADDRESS(record, roles, False), numbers_of(row, h, on_grad, on_update, averages)
        SMALL: tl.constexpr = max(max(BLOCK // 8, LANES), GRANULE)
        for first in tl.range(vectors, valid, SMALL):
            span = span_of(start + first, valid - first, SMALL)
            sums = update(
                tensors, span, numbers, factor, units, means, draw, forms, on_grad, on_update, sums, RULE, COMPUTE
            )
    if vectors > 0:
        numbers, span = numbers_of(row, h, on_grad, on_update, averages), whole_span(start, vectors, GRANULE, BLOCK)
        sums = update(
            aligned, span, numbers, factor, units, means, draw, forms, on_grad, on_update, sums, RULE, COMPUTE
        )
    return sums


@triton.jit
def look_at_tiles(
    table, tensor, start, length, roles, forms, sums,
    ADDRESS: tl.constexpr, COMPUTE: tl.constexpr, FIELDS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``update_tiles`` of a step that is skipped."""
    t = ADDRESS(table + tensor * FIELDS, roles, False)
    while length > 0:
        first = (length - 1) & -BLOCK
        span = span_of(start + first, length - first, BLOCK)
        p = forms.param.load(t.param, span, COMPUTE)
        sums = with_step(with_gradient(sums, read(t.grad, span).to(COMPUTE)), tl.zeros_like(p), p, span)
        forms.grad(t.grad, span)
        length = first
    return sums


@triton.jit
def row_of(record, rows, late, variants, WIDTH: tl.constexpr):
    """The row of the tensor's cohort for the number of skipped steps that the device knows of."""
    # Only the last product in 64 bits: each further one takes three instructions.
    return rows + (tl.load(record + ROW).to(tl.int32) * variants + late).to(tl.int64) * WIDTH


@triton.jit
def numbers_of(row, h, on_grad, on_update, averages):
    return Numbers(
        row, columns(row, h), arguments_of(on_grad, row), arguments_of(on_update, row), columns(row, averages)
    )


@triton.jit
def direction(t, span, numbers, factor, units, forms, on_grad, sums, RULE: tl.constexpr, COMPUTE: tl.constexpr):
    """What the rule makes of one tile: (u, p, g, new states, sums with g's squares); nothing is stored."""
    raw = widened(read(t.grad, span), COMPUTE)
    # Now: behind the rule, whose root and division have branches, it would have kept its registers.
    sums = with_gradient(sums, raw)
    p = forms.param.load(t.param, span, COMPUTE)
    state = ()
    for k in tl.static_range(len(t.states)):
        state += (forms.states[k].load(t.states[k], span, COMPUTE),)
    g = through(on_grad, scaled(raw, factor, units, span), p, numbers.on_grad)
    u, state = RULE(g, state, loaded(numbers.h))
    tl.static_assert(len(state) == len(t.states), "a rule returns as many states as it was given")
    return u, p, g, state, sums


@triton.jit
def update(
    t, span, numbers, factor, units, means, draw, forms, on_grad, on_update, sums,
    RULE: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    u, p, g, state, sums = direction(t, span, numbers, factor, units, forms, on_grad, sums, RULE, COMPUTE)
    forms.grad(t.grad, span)
    if means is None:
        u = through(on_update, u, p, numbers.on_update)
    else:
        u = through_with_means(on_update, u, p, g, numbers.on_update, means)
    p = p - tl.load(numbers.lr) * u
    for k in tl.static_range(len(t.states)):
        forms.states[k].store(t.states[k], span, state[k], draw, 1 + k)
    forms.param.store(t.param, span, p, draw, 0)
    sums = with_step(sums, u, p, span)
    for k in tl.static_range(len(t.averages)):
        average = forms.averages[k].load(t.averages[k], span, COMPUTE)
        average = follow(average, p, loaded(numbers.averages)[k])
        forms.averages[k].store(t.averages[k], span, average, draw, 1 + len(t.states) + k)
    return sums


@triton.jit
def follow(average, p, weight):
    """a <- a + weight (p - a), with the new p as it was before rounding; a copy where the weight is 1"""
    return tl.where(weight == 1, p, average + weight * (p - average))
