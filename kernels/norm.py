"""The global gradient norm and what follows from it, without leaving the device.

Each of SLOTS slots is the sum of the squares of every SLOTS-th tile in float64, lane by lane and in a fixed order, so
the norm is the same to the last bit from run to run and from rank to rank, whatever the addresses, their alignment and
the number of programs. The last program to finish adds the slots up and passes the verdict.

float64 holds the square of every float32: finite gradients never look infinite.
"""

import triton
import triton.language as tl

from .address import IS_ALIGNED, at, tile_at

# The verdict, float64 [4]: the norm before clipping, the factor for every gradient, whether this step
# is skipped, and how many steps have been skipped so far.
NORM = tl.constexpr(0)
FACTOR = tl.constexpr(1)
NONFINITE = tl.constexpr(2)
SKIPPED = tl.constexpr(3)


@triton.jit(do_not_specialize=["tile_count", "first_slot", "slot_count"])
def sum_of_squares(
    table,  # int64 [tensors, FIELDS]: see address.py
    tiles,  # int32 [tile_count, TILE_FIELDS]: see address.py
    tile_count: tl.int32,
    grad,  # Role
    slots,  # float64 [slot_count]
    first_slot: tl.int32,
    slot_count: tl.int32,
    ticket,  # int32 [1], zero between launches; None: another launch passes the verdict
    verdict,
    target: tl.float64,
    epsilon: tl.float64,
    largest: tl.float64,
    loss_scale,
    found_inf,
    CLIP: tl.constexpr,
    SKIP: tl.constexpr,
    FIELDS: tl.constexpr,
    BLOCK: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """One program per slot."""
    slot = tl.program_id(0)
    tl.store(slots + first_slot + slot, squares_of(table, tiles, slot, tile_count, grad, FIELDS, BLOCK, SLOTS))

    if ticket is not None:
        # Acquire and release: the last program sees the other programs' sums.
        if tl.atomic_add(ticket, 1, sem="acq_rel", scope="gpu") == tl.num_programs(0) - 1:
            tl.store(ticket, 0)
            judge(slots, slot_count, verdict, target, epsilon, largest, loss_scale, found_inf, CLIP, SKIP, SLOTS)


@triton.jit
def squares_of(
    table, tiles, slot, tile_count, grad, FIELDS: tl.constexpr, BLOCK: tl.constexpr, SLOTS: tl.constexpr
):  # fmt: skip
    """The sum of one slot."""
    lanes = tl.arange(0, BLOCK)
    squares = tl.zeros((BLOCK,), tl.float64)
    for tile in tl.range(slot, tile_count, SLOTS):
        tensor, start, valid = tile_at(tiles, tile, BLOCK)
        record = table + tensor * FIELDS
        if tl.load(record + IS_ALIGNED) != 0:
            pointer = at(record, grad, True) + start
            whole = tl.multiple_of(valid & -8, 8)
            g = tl.load(pointer + lanes, mask=lanes < whole, other=0.0).to(tl.float64)
            squares += g * g
            if whole < valid:
                g = tl.load(pointer + lanes, mask=(lanes >= whole) & (lanes < valid), other=0.0).to(tl.float64)
                squares += g * g
        else:
            g = tl.load(at(record, grad, False) + start + lanes, mask=lanes < valid, other=0.0).to(tl.float64)
            squares += g * g
    return tl.sum(squares)


@triton.jit(do_not_specialize=["slot_count"])
def judge(
    slots,
    slot_count: tl.int32,
    verdict,
    target: tl.float64,
    epsilon: tl.float64,
    largest: tl.float64,
    loss_scale,  # float32 [1] of a GradScaler, or None
    found_inf,  # float32 [1] of a GradScaler, or None
    CLIP: tl.constexpr,
    SKIP: tl.constexpr,
    SLOTS: tl.constexpr,
):
    weighed = weigh(slots, slot_count, target, epsilon, largest, loss_scale, found_inf, CLIP, SKIP, SLOTS)
    write_down(verdict, weighed, tl.load(verdict + SKIPPED))


@triton.jit
def weigh(
    slots, slot_count, target, epsilon, largest, loss_scale, found_inf,
    CLIP: tl.constexpr, SKIP: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """(norm, factor, skip), with factor = min(largest, target / (norm + epsilon)) / loss_scale: with largest = 1 and
    epsilon = 1e-6 as torch.nn.utils.clip_grad_norm_ does."""
    total = tl.zeros((SLOTS,), tl.float64)
    for first in tl.range(0, slot_count, SLOTS):
        # .cg: the slots were written by other programs of this launch; L1 may hold older values.
        total += tl.load(slots + first + tl.arange(0, SLOTS), cache_modifier=".cg")
    norm = tl.sqrt(tl.sum(total))
    factor = tl.full((), 1.0, tl.float64)
    if loss_scale is not None:
        factor = 1.0 / tl.load(loss_scale).to(tl.float64)
        norm = norm * factor
    if CLIP:
        factor = factor * tl.minimum(target / (norm + epsilon), largest, propagate_nan=tl.PropagateNan.ALL)
    skip = 0
    if SKIP:
        skip = tl.where(norm < float("inf"), 0, 1)
    if found_inf is not None:
        skip = skip | tl.where(tl.load(found_inf) != 0, 1, 0)
    return norm, factor, skip


@triton.jit
def write_down(verdict, weighed, skipped):
    """``skipped``: the steps that were skipped before this one."""
    norm, factor, skip = weighed
    tl.store(verdict + NORM, norm)
    tl.store(verdict + FACTOR, factor)
    tl.store(verdict + NONFINITE, skip)
    tl.store(verdict + SKIPPED, skipped + skip)
