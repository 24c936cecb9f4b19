"""The clipped step in one launch: norm, grid barrier, verdict, update.

All programs of a cooperative launch run at the same time, so that each may wait for the others. Each of them sums the
squares of its slots, waits, passes the same verdict from the same slots, and updates the tiles of its own slots, the
latest first, whose gradients may still lie in the second-level cache. The same functions as in norm.py and step.py do
the work, and the result is theirs to the last bit.
"""

import triton
import triton.language as tl

from .address import NUMEL, tile_at
from .norm import SKIPPED, squares_of, weigh, write_down
from .step import late_skips, look_at_tiles, named, row_of, update_tiles
from .tally import SUMS, nothing, store_sums


@triton.jit(repr=named("clipped"), do_not_specialize=["tile_count", "known_skips", "variants", "seed"])
def clipped_step(
    table,
    tiles,  # int32 [tile_count, TILE_FIELDS]: those of the norm
    tile_count: tl.int32,
    rows,
    slots,  # float64 [SLOTS]
    barrier,  # int32 [1]; bit 31 turns over with every launch, the others are zero between launches
    verdict,
    target: tl.float64,
    epsilon: tl.float64,
    largest: tl.float64,
    loss_scale,
    found_inf,
    known_skips: tl.int32,
    variants: tl.int32,
    seed: tl.int64,
    units,
    tally,  # float64 [tile_count, SUMS], or None: nobody wants the norms
    roles,
    forms,
    h,
    on_grad,
    on_update,
    averages,
    CLIP: tl.constexpr,
    SKIP: tl.constexpr,
    RULE: tl.constexpr,
    ADDRESS: tl.constexpr,
    COMPUTE: tl.constexpr,
    FIELDS: tl.constexpr,
    WIDTH: tl.constexpr,
    GRANULE: tl.constexpr,
    DRAWS: tl.constexpr,
    BLOCK: tl.constexpr,
    NORM_BLOCK: tl.constexpr,
    SLOTS: tl.constexpr,
    LANES: tl.constexpr,  # see tracked.py; 0 without a tally
):
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    # Before the barrier: behind it the first program counts on.
    skipped = tl.load(verdict + SKIPPED)
    for slot in tl.range(program, SLOTS, programs):
        tl.store(slots + slot, squares_of(table, tiles, slot, tile_count, roles.grad, FIELDS, NORM_BLOCK, SLOTS))
    arrive_and_wait(barrier)
    weighed = weigh(slots, SLOTS, target, epsilon, largest, loss_scale, found_inf, CLIP, SKIP, SLOTS)
    if program == 0:
        write_down(verdict, weighed, skipped)
    norm, factor, skip = weighed
    if skip == 0:
        # One loop over what are two in the norm, slots and their tiles, which keeps a single number from tile to tile:
        # the update needs the registers.
        length = tl.cdiv(tile_count, SLOTS) * SLOTS
        number = program + (SLOTS - 1 - program) // programs * programs + length - SLOTS
        while number != program - SLOTS:
            if number < tile_count:
                sums = ()
                if tally is not None:
                    sums = nothing(LANES, COMPUTE)
                parts = tl.cdiv(tile_at(tiles, number, NORM_BLOCK)[2], BLOCK)
                while parts > 0:
                    parts -= 1
                    # Read again, to keep nothing. The first program writes what was there, since nothing is skipped.
                    late = late_skips(tl.load(verdict + SKIPPED), known_skips, variants)
                    tensor, first, of_norm = tile_at(tiles, number, NORM_BLOCK)
                    start = tl.multiple_of(first + parts * BLOCK, BLOCK)
                    # Not from of_norm, which takes ptxas more registers.
                    valid = tl.minimum(tl.load(table + tensor * FIELDS + NUMEL) - start, BLOCK).to(tl.int32)
                    sums = update_tiles(
                        table, tensor, start, valid, rows, None, factor.to(COMPUTE), units, late, variants, seed,
                        roles, forms, h, on_grad, on_update, averages, sums,
                        RULE, ADDRESS, COMPUTE, FIELDS, 0, WIDTH, GRANULE, DRAWS, BLOCK, LANES, True,
                    )  # fmt: skip
                if tally is not None:
                    tensor, first, of_norm = tile_at(tiles, number, NORM_BLOCK)
                    late = late_skips(tl.load(verdict + SKIPPED), known_skips, variants)
                    row = row_of(table + tensor * FIELDS, rows, late, variants, WIDTH)
                    store_sums(sums, tally + number * SUMS, row, loss_scale)
            number -= SLOTS
            if (number < 0) & (number != program - SLOTS):
                number += length - programs
    else:
        for slot in tl.range(program, SLOTS, programs):
            for number in tl.range(slot, tile_count, SLOTS):
                tensor, first, of_norm = tile_at(tiles, number, NORM_BLOCK)
                sums = ()
                if tally is not None:
                    sums = nothing(LANES, COMPUTE)
                sums = look_at_tiles(table, tensor, first, of_norm, roles, forms, sums, ADDRESS, COMPUTE, FIELDS, BLOCK)
                if tally is not None:
                    row = row_of(table + tensor * FIELDS, rows, 0, variants, WIDTH)
                    store_sums(sums, tally + number * SUMS, row, loss_scale)


@triton.jit
def arrive_and_wait(barrier):
    """Wait until all programs of the grid have come here; what each stored before, all see behind it.

    Every program adds 1, the first one what is missing to 2^31: bit 31 turns over when the last has come, and the other
    bits are zero again. Nothing has to be reset and nobody counts the launches, so a graph may replay them.
    """
    tl.debug_barrier()
    here = tl.where(tl.program_id(0) == 0, -2147483648 - (tl.num_programs(0) - 1), 1).to(tl.int32)
    before = tl.atomic_add(barrier, here, sem="release", scope="gpu")
    # Reading by adding 0: Triton makes it the load with acquire that a volatile load is not.
    while ((before ^ tl.atomic_add(barrier, 0, sem="acquire", scope="gpu")) & -2147483648) == 0:
        pass
    tl.debug_barrier()
