"""The update with its norms: step.py's, several tiles of one tensor per program, whose squares are summed on the way.

To add up the threads' sums takes as long as to update a tile, so a program does it once for all its tiles. Where the
step is skipped, only the squares are taken.
"""

import triton
import triton.language as tl

from .address import NUMEL
from .means import CHUNK_FIELDS
from .norm import FACTOR
from .step import heed, look_at_tiles, named, row_of, update_tiles
from .tally import SUMS, nothing, store_sums


@triton.jit(repr=named("tracked"), do_not_specialize=["known_skips", "variants", "seed"])
def tracked_step(
    table,  # int64 [tensors, FIELDS]: see address.py
    chunks,  # int32 [programs, CHUNK_FIELDS]: see means.py
    rows,  # see step.py
    means,
    verdict,
    known_skips: tl.int32,
    variants: tl.int32,
    seed: tl.int64,
    units,
    tally,  # float64 [programs, SUMS]
    loss_scale,  # float32 [1] of a GradScaler, or None
    roles,
    forms,
    h,
    on_grad,
    on_update,
    averages,
    RULE: tl.constexpr,
    ADDRESS: tl.constexpr,
    COMPUTE: tl.constexpr,
    FIELDS: tl.constexpr,
    MEANS: tl.constexpr,
    WIDTH: tl.constexpr,
    GRANULE: tl.constexpr,
    DRAWS: tl.constexpr,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,  # threads, of which each has neighbouring elements
):
    program = tl.program_id(0).to(tl.int64)
    skip, late = heed(verdict, known_skips, variants)
    factor = None
    if verdict is not None:
        factor = tl.load(verdict + FACTOR).to(COMPUTE)
        # As in step.py.
        program = tl.num_programs(0) - 1 - program
    chunk = chunks + program * CHUNK_FIELDS
    tensor = tl.load(chunk).to(tl.int64)
    sums = nothing(LANES, COMPUTE)
    start = tl.multiple_of(tl.load(chunk + 1).to(tl.int64) * BLOCK, BLOCK)
    length = tl.minimum(tl.load(table + tensor * FIELDS + NUMEL) - start, tl.load(chunk + 2) * BLOCK).to(tl.int32)
    if skip == 0:
        sums = update_tiles(
            table, tensor, start, length, rows, means, factor, units, late, variants, seed, roles, forms, h, on_grad,
            on_update, averages, sums, RULE, ADDRESS, COMPUTE, FIELDS, MEANS, WIDTH, GRANULE, DRAWS, BLOCK, LANES,
            False,
        )  # fmt: skip
    else:
        sums = look_at_tiles(table, tensor, start, length, roles, forms, sums, ADDRESS, COMPUTE, FIELDS, BLOCK)
    row = row_of(table + tensor * FIELDS, rows, late, variants, WIDTH)
    store_sums(sums, tally + program * SUMS, row, loss_scale)
