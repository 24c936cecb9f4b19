"""How float32 values are stored, and read back: the forms.

A form is a pair of functions over the tensors ``parts`` that together hold one value per element::

    load(parts, span, COMPUTE) -> x            store(parts, span, x, draw, ROLE)

``x`` is a block of float32 values (float64 for float64 parameters), whatever the parts are. A rule never knows its
states' forms. Each form's twin in torch has the same name in ``fusedopt/forms.py``, and stores the same values in the
same bits.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from triton.language.target_info import is_hip

from .philox import sixteen_bits

QUANTIZED = tl.constexpr(256)
"""Elements that share one scale."""


class Form(NamedTuple):
    """Bare jit functions: see stages.Stage."""

    load: object
    store: object


class Forms(NamedTuple):
    """One form per role; gradients are autograd's, and only read."""

    grad: object  # a bare jit function of (pointer, span): what is left where a gradient was read, nothing or zeros
    param: Form
    states: tuple
    averages: tuple


class Span(NamedTuple):
    """Neighbouring elements of a tensor: the first one's number, how many there are, and which lanes hold them."""

    first: object
    count: object
    lanes: object
    mask: object
    whole: object  # whether quantized elements that share a scale are all there or all missing


@triton.jit
def whole_span(first, count, GRANULE: tl.constexpr, N: tl.constexpr):
    """Of N lanes, where as many elements are all there or all missing as GRANULE says; ``count`` must tell the compiler
    that it is a multiple of that."""
    # No more at once than a thread takes of all dtypes: more of a narrow one would have to change places with other
    # threads.
    AT_ONCE: tl.constexpr = min(GRANULE, 8)
    lanes = tl.max_contiguous(tl.arange(0, N), AT_ONCE)
    return Span(first, count, lanes, lanes < count, True)


@triton.jit
def span_of(first, count, N: tl.constexpr):
    """Of N lanes."""
    # Nothing is loaded as vectors here. But should the compiler choose one layout for these lanes and whole_span's,
    # then none in which a thread takes more of float32 at once than it can store.
    lanes = tl.max_contiguous(tl.arange(0, N), 4)
    return Span(first, count, lanes, lanes < count, False)


@triton.jit
def read(pointer, span):
    return tl.load(pointer + (span.first + span.lanes), mask=span.mask, other=0, eviction_policy="evict_first")


@triton.jit
def widened(x, COMPUTE: tl.constexpr):
    """x in a dtype of arithmetic."""
    if x.dtype == tl.bfloat16:
        # The upper half of float32's bits. For two neighbours in one register the plain conversion takes three
        # instructions on NVIDIA, this two.
        bits = x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16
        return bits.to(tl.float32, bitcast=True).to(COMPUTE)
    else:
        return x.to(COMPUTE)


@triton.jit
def write(pointer, span, x):
    # On NVIDIA evict_first too, but without the policy that Triton 3.6 forms again for each.
    STREAMING: tl.constexpr = "" if is_hip() else ".cs"
    tl.store(pointer + (span.first + span.lanes), x, mask=span.mask, cache_modifier=STREAMING)


@triton.jit
def leave(pointer, span):
    """Gradients stay as they are."""
    pass


@triton.jit
def zero(pointer, span):
    """Gradients are zero when the step has read them."""
    # Perhaps by others: beside narrower or aligned tensors a thread may read more elements at once than it can store.
    tl.debug_barrier()
    write(pointer, span, 0.0)


@triton.jit
def load_nearest(parts, span, COMPUTE: tl.constexpr):
    return widened(read(parts[0], span), COMPUTE)


@triton.jit
def store_nearest(parts, span, x, draw, ROLE: tl.constexpr):
    """to the nearest, ties to even"""
    write(parts[0], span, x.to(parts[0].dtype.element_ty))


@triton.jit
def store_stochastic(parts, span, x, draw, ROLE: tl.constexpr):
    """up or down with the probabilities that make the mean x"""
    dtype: tl.constexpr = parts[0].dtype.element_ty
    bits = sixteen_bits(draw, span.first, ROLE, span.mask.shape[0])
    x = x.to(tl.float32)
    if dtype == tl.bfloat16:
        up = (x.to(tl.uint32, bitcast=True) + bits) >> 16
        rounded = up.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        # float16 keeps 13 bits less than float32; below 2^-14 it has steps of 2^-24, which are those of the numbers
        # from 2^-14 to 2^-13.
        size = tl.abs(x)
        lift = tl.where(size < 2.0**-14, 2.0**-14, 0.0)
        up = ((size + lift).to(tl.uint32, bitcast=True) + (bits >> 3)) & 0xFFFFE000
        size = up.to(tl.float32, bitcast=True) - lift
        # Not -size: before Triton 3.7 that is 0 - size, and no zero is negative.
        sign = x.to(tl.uint32, bitcast=True) & 0x80000000
        rounded = (size.to(tl.uint32, bitcast=True) | sign).to(tl.float32, bitcast=True).to(dtype)
    write(parts[0], span, tl.where(x == x, rounded, x.to(dtype)))


@triton.jit
def load_kahan(parts, span, COMPUTE: tl.constexpr):
    """p + c, where c is what rounding took from p. Where somebody wrote another p, c is not its own any more, if it is
    so large that it would change p."""
    p = read(parts[0], span)
    x = p.to(COMPUTE)
    exact = x + read(parts[1], span).to(COMPUTE)
    return tl.where(exact.to(p.dtype) == p, exact, x)


@triton.jit
def store_kahan(parts, span, x, draw, ROLE: tl.constexpr):
    p = x.to(parts[0].dtype.element_ty)
    c = (x - p.to(x.dtype)).to(p.dtype)
    # Rounded up to half the distance of p's neighbour, c would make it p: then the next number towards zero.
    c = c.to(tl.int16, bitcast=True) - ((p.to(x.dtype) + c.to(x.dtype)).to(p.dtype) != p).to(tl.int16)
    c = tl.where(tl.abs(x) < float("inf"), c, 0)
    write(parts[0], span, p)
    write(parts[1], span, c.to(p.dtype, bitcast=True))


@triton.jit
def load_fp32(parts, span, COMPUTE: tl.constexpr):
    """The master, except where somebody wrote another p."""
    p = read(parts[0], span)
    master = read(parts[1], span)
    return tl.where(master.to(p.dtype) == p, master, p.to(COMPUTE))


@triton.jit
def store_fp32(parts, span, x, draw, ROLE: tl.constexpr):
    write(parts[0], span, x.to(parts[0].dtype.element_ty))
    write(parts[1], span, x)


@triton.jit
def load_split(parts, span, COMPUTE: tl.constexpr):
    """float32 whose upper 16 bits, rounded, are p (bfloat16), and whose lower ones are an int16, or the upper 8 of
    these an int8"""
    high = read(parts[0], span).to(tl.int16, bitcast=True).to(tl.int32) << 16
    low = read(parts[1], span).to(tl.int32) << (16 - parts[1].dtype.element_ty.primitive_bitwidth)
    # A zero has no negative lower bits. Somebody else's zero might, and would be NaN with them.
    low = tl.where(high << 1 == 0, tl.maximum(low, 0), low)
    return (high + low).to(tl.float32, bitcast=True)


@triton.jit
def store_split(parts, span, x, draw, ROLE: tl.constexpr):
    low_type: tl.constexpr = parts[1].dtype.element_ty
    # A NaN with all bits set would carry over into a zero.
    bits = tl.where(x == x, x.to(tl.int32, bitcast=True), 0x7FC00000)
    if low_type == tl.int8:
        bits += 0x80
    high = (bits + 0x8000) >> 16
    write(parts[0], span, high.to(tl.int16).to(tl.bfloat16, bitcast=True))
    write(parts[1], span, (bits >> (16 - low_type.primitive_bitwidth)).to(low_type))


@triton.jit
def load_signed8(parts, span, COMPUTE: tl.constexpr):
    """q scale"""
    return scaled(read(parts[0], span).to(tl.float32), parts[1], span).to(COMPUTE)


@triton.jit
def store_signed8(parts, span, x, draw, ROLE: tl.constexpr):
    """q = round(x / scale) with scale = max |x| / 127 over the block; a NaN or inf makes the whole block NaN"""
    q = quantized(x.to(tl.float32), 127, parts[1], span)
    write(parts[0], span, whole(q).to(tl.int8))


@triton.jit
def load_root8(parts, span, COMPUTE: tl.constexpr):
    """(q scale)^2"""
    root = scaled(read(parts[0], span).to(tl.float32), parts[1], span)
    return (root * root).to(COMPUTE)


@triton.jit
def store_root8(parts, span, x, draw, ROLE: tl.constexpr):
    """q = round(sqrt(x) / scale) with scale = max sqrt(x) / 255, but 1 at least where x > 0: what is divided by the
    root must not see a zero that is none"""
    root = tl.math.sqrt_rn(x.to(tl.float32))
    q = quantized(root, 255, parts[1], span)
    write(parts[0], span, whole(tl.maximum(q, tl.where(root > 0, 1.0, 0.0))).to(tl.uint8))


@triton.jit
def whole(q):
    """To the nearest integer, ties to even, for |q| < 2^22. By addition: a GPU converts four times slower."""
    return (q + 12582912.0).to(tl.int32, bitcast=True)


@triton.jit
def quantized(x, STEPS: tl.constexpr, scales, span):
    """x / scale, for each block's scale; stores the scales."""
    ROWS: tl.constexpr = x.shape[0] // QUANTIZED
    if not span.whole:
        x = tl.where(span.mask, x, 0.0)
    # Of a thread's eight first. As integers, NaN is larger than inf, and inf than any number.
    eights = tl.reshape(largest_of_eights(x), (ROWS, QUANTIZED // 8))
    largest = tl.max(eights.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1).to(tl.float32, bitcast=True)
    # Not below the smallest normal number, whose reciprocal is finite.
    scale = tl.maximum(largest * (1.0 / STEPS), 2.0**-126, propagate_nan=tl.PropagateNan.ALL)
    inverse = tl.math.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)
    scale = tl.where(scale < float("inf"), scale, float("nan"))
    # By the first thread of each row: a store by rows would have to bring the scales there.
    rows, threads = tl.arange(0, ROWS)[:, None], tl.arange(0, QUANTIZED // 8)[None, :]
    mask = (rows * QUANTIZED < span.count) & (threads == 0)
    tl.store(
        scales + span.first // QUANTIZED + (rows + threads), tl.broadcast_to(scale[:, None], eights.shape), mask=mask
    )
    return tl.reshape(tl.reshape(x, (ROWS, QUANTIZED)) * inverse[:, None], (ROWS * QUANTIZED,))


@triton.jit
def largest_of_eights(x):
    """The largest size among every eight neighbours; NaN if one of them is."""
    # AMD has no maximum that keeps NaN; but as integers NaN is the largest.
    x = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF if is_hip() else tl.abs(x)
    for _ in tl.static_range(3):
        a, b = tl.split(tl.reshape(x, (x.shape[0] // 2, 2)))
        x = tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)
    return x


@triton.jit
def scaled(q, scales, span):
    ROWS: tl.constexpr = q.shape[0] // QUANTIZED
    rows = tl.arange(0, ROWS)
    scale = tl.load(scales + span.first // QUANTIZED + rows, mask=rows * QUANTIZED < span.count, other=0.0)
    return tl.reshape(tl.reshape(q, (ROWS, QUANTIZED)) * scale[:, None], (ROWS * QUANTIZED,))


FORMS = {
    "nearest": Form(load_nearest, store_nearest),
    "stochastic": Form(load_nearest, store_stochastic),
    "kahan": Form(load_kahan, store_kahan),
    "fp32": Form(load_fp32, store_fp32),
    "split": Form(load_split, store_split),
    "split8": Form(load_split, store_split),
    "signed8": Form(load_signed8, store_signed8),
    "root8": Form(load_root8, store_root8),
}
