"""Means over each tensor of terms of what the rule receives and returns, for the stages of the update chain that need
them: one launch between the norm and the update, which computes what the update will and stores nothing of it.

Each program adds the terms of a few tiles of one tensor in float64, lane by lane. The last of a tensor's programs to
finish adds their sums up in a fixed order, so the means are the same to the last bit from run to run.
"""

import triton
import triton.language as tl

from .address import IS_ALIGNED, NUMEL
from .norm import FACTOR
from .rounding import span_of, whole_span
from .stages import arguments_of, loaded
from .step import direction, heed, named, numbers_of, row_of
from .units import of_tensor

# The fields of a chunk: tensor, first tile within the tensor, tiles, the tensor's first chunk, how many it has.
CHUNK_FIELDS = tl.constexpr(5)

PARTIALS = tl.constexpr(128)
"""Sums of a tensor's programs that are added at once."""


@triton.jit(repr=named("means"), do_not_specialize=["known_skips", "variants"])
def means_of_terms(
    table,  # int64 [tensors, FIELDS]: see address.py
    chunks,  # int32 [programs, CHUNK_FIELDS]
    rows,  # COMPUTE [cohorts, variants, WIDTH]: see step.py
    partials,  # float64 [programs, len(terms)]
    tickets,  # int32 [tensors], zero between launches
    means,  # float64 [tensors, len(terms)]
    verdict,
    known_skips: tl.int32,
    variants: tl.int32,
    units,
    roles,
    forms,
    h,
    on_grad,
    terms,
    RULE: tl.constexpr,
    ADDRESS: tl.constexpr,
    COMPUTE: tl.constexpr,
    FIELDS: tl.constexpr,
    WIDTH: tl.constexpr,
    GRANULE: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    chunk = chunks + program * CHUNK_FIELDS
    tensor = tl.load(chunk).to(tl.int64)
    record = table + tensor * FIELDS
    skip, late = heed(verdict, known_skips, variants)
    if skip != 0:
        return
    factor = None
    if verdict is not None:
        factor = tl.load(verdict + FACTOR).to(COMPUTE)
    row = row_of(record, rows, late, variants, WIDTH)
    numbers, arguments = numbers_of(row, h, on_grad, (), ()), arguments_of(terms, row)
    t = ADDRESS(record, roles, True)
    if units is not None:
        units = of_tensor(units, tensor)

    SMALL: tl.constexpr = max(BLOCK // 8, GRANULE)
    numel = tl.load(record + NUMEL)
    is_aligned = tl.load(record + IS_ALIGNED) != 0
    first = tl.load(chunk + 1)
    sums, rest = zeros(terms, BLOCK // VECTOR), zeros(terms, SMALL)
    for tile in tl.range(first, first + tl.load(chunk + 2)):
        start = tl.multiple_of(tl.cast(tile, tl.int64) * BLOCK, BLOCK)
        valid = tl.minimum(numel - start, BLOCK).to(tl.int32)
        # As in step.py.
        vectors = tl.multiple_of(tl.where(is_aligned, valid & -GRANULE, 0), GRANULE)
        if vectors > 0:
            span = whole_span(start, vectors, GRANULE, BLOCK)
            u, p, g, state, _ = direction(t, span, numbers, factor, units, forms, on_grad, (), RULE, COMPUTE)
            sums = added(sums, terms, u, p, g, state, arguments, span.mask, VECTOR)
        if vectors < valid:
            loose = ADDRESS(record, roles, False)
            for at in tl.range(vectors, valid, SMALL):
                span = span_of(start + at, valid - at, SMALL)
                u, p, g, state, _ = direction(loose, span, numbers, factor, units, forms, on_grad, (), RULE, COMPUTE)
                rest = added(rest, terms, u, p, g, state, arguments, span.mask, 1)
    for k in tl.static_range(len(terms)):
        tl.store(partials + program * len(terms) + k, tl.sum(sums[k]) + tl.sum(rest[k]))

    # Acquire and release: the tensor's last program sees the others' sums.
    programs = tl.load(chunk + 4)
    if tl.atomic_add(tickets + tensor, 1, sem="acq_rel", scope="gpu") == programs - 1:
        tl.store(tickets + tensor, 0)
        parts = partials + tl.load(chunk + 3).to(tl.int64) * len(terms)
        for k in tl.static_range(len(terms)):
            total = tl.zeros((PARTIALS,), tl.float64)
            for at in tl.range(0, programs, PARTIALS):
                places = at + tl.arange(0, PARTIALS)
                # .cg: other programs of this launch wrote them; L1 may hold older values.
                total += tl.load(
                    parts + places * len(terms) + k, mask=places < programs, other=0.0, cache_modifier=".cg"
                )
            tl.store(means + tensor * len(terms) + k, tl.sum(total) / numel)


@triton.jit
def zeros(terms, SIZE: tl.constexpr):
    return tl.tuple([tl.zeros((SIZE,), tl.float64) for term in terms])


@triton.jit
def added(sums, terms, u, p, g, state, arguments, mask, VECTOR: tl.constexpr):
    """Each sum with its term added where the mask is set."""
    found = ()
    for k in tl.static_range(len(terms)):
        x = terms[k].fn(u, p, g, state, *loaded(arguments[k]))
        x = tl.where(mask, x, 0.0).to(tl.float64)
        found += (sums[k] + tl.sum(tl.reshape(x, (x.shape[0] // VECTOR, VECTOR)), 1),)
    return found
