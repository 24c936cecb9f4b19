"""The numbers of a step where only the device knows how many were taken (``capturable=True``), by one launch.

The formulas of these numbers stand in Python (``hyper``, ``lr`` and their like). Here they come as a *program*: four
numbers for each operation, which one it is and which three values it takes, with 0 for those that it does not need. The
values of one parameter are, in this order, what its state holds (the step count, then the rule's scalars), the tensors
among its group's options, constants, and the operations' results. All of them are float64.
"""

import triton
import triton.language as tl

from .norm import NONFINITE

ADD = tl.constexpr(0)
SUB = tl.constexpr(1)
MUL = tl.constexpr(2)
DIV = tl.constexpr(3)
POW = tl.constexpr(4)
MAXIMUM = tl.constexpr(5)
MINIMUM = tl.constexpr(6)
LT = tl.constexpr(7)
LE = tl.constexpr(8)
GT = tl.constexpr(9)
GE = tl.constexpr(10)
EQ = tl.constexpr(11)
NE = tl.constexpr(12)
WHERE = tl.constexpr(13)
FLOAT32 = tl.constexpr(14)


@triton.jit(do_not_specialize=["count"])
def write_rows(
    table,  # [rows, len(OUTPUTS)]
    members,  # int64 [count, 2]: row and group of each parameter
    states,  # int64 [rows, len(STATES)]: addresses
    tensors,  # int64 [groups, len(TENSORS)]: addresses, or None
    constants,  # float64 [CONSTANTS]
    count,
    STATES: tl.constexpr,  # dtypes
    TENSORS: tl.constexpr,
    CONSTANTS: tl.constexpr,
    PROGRAM: tl.constexpr,
    OUTPUTS: tl.constexpr,  # which values are stored
    BLOCK: tl.constexpr,
):
    """The rows of hyperparameters that the update kernels read."""
    row, group, here = members_of_program(members, count, BLOCK)
    values = known_values(row, group, here, states, tensors, constants, STATES, TENSORS, CONSTANTS)
    values = with_results(values, PROGRAM)
    for k in tl.static_range(len(OUTPUTS)):
        tl.store(table + row * len(OUTPUTS) + k, values[OUTPUTS[k]].to(table.dtype.element_ty), mask=here)


@triton.jit(do_not_specialize=["count"])
def advance(
    verdict,  # float64 [4] of norm.judge, or None: nothing is skipped
    members,
    states,
    tensors,
    constants,
    count,
    STATES: tl.constexpr,
    TENSORS: tl.constexpr,
    CONSTANTS: tl.constexpr,
    PROGRAM: tl.constexpr,
    OUTPUTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """What the states hold after the step takes the place of what they held before it, unless it was skipped."""
    if verdict is not None:
        count = tl.where(tl.load(verdict + NONFINITE) == 0, count, 0)
    row, group, here = members_of_program(members, count, BLOCK)
    values = known_values(row, group, here, states, tensors, constants, STATES, TENSORS, CONSTANTS)
    values = with_results(values, PROGRAM)
    for k in tl.static_range(len(OUTPUTS)):
        place = address(states, row * len(STATES) + k, STATES[k], here)
        tl.store(place, values[OUTPUTS[k]].to(STATES[k]), mask=here)


@triton.jit
def members_of_program(members, count, BLOCK: tl.constexpr):
    """The row and the group of each parameter of a program, and which lanes have one."""
    k = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = k < count
    return tl.load(members + 2 * k, mask=here, other=0), tl.load(members + 2 * k + 1, mask=here, other=0), here


@triton.jit
def known_values(
    row, group, here, states, tensors, constants,
    STATES: tl.constexpr, TENSORS: tl.constexpr, CONSTANTS: tl.constexpr,
):  # fmt: skip
    values = ()
    for k in tl.static_range(len(STATES)):
        place = address(states, row * len(STATES) + k, STATES[k], here)
        values = appended(values, tl.load(place, mask=here, other=1.0).to(tl.float64))
    for k in tl.static_range(len(TENSORS)):
        place = address(tensors, group * len(TENSORS) + k, TENSORS[k], here)
        values = appended(values, tl.load(place, mask=here, other=1.0).to(tl.float64))
    for k in tl.static_range(CONSTANTS):
        values = appended(values, tl.load(constants + k) + tl.zeros(row.shape, tl.float64))
    return values


@triton.jit
def address(table, number, DTYPE: tl.constexpr, here):
    return tl.load(table + number, mask=here, other=0).to(tl.pointer_type(DTYPE))


@triton.jit
def with_results(values, PROGRAM: tl.constexpr):
    for k in tl.static_range(len(PROGRAM) // 4):
        a, b, c = values[PROGRAM[4 * k + 1]], values[PROGRAM[4 * k + 2]], values[PROGRAM[4 * k + 3]]
        values = appended(values, operation(PROGRAM[4 * k], a, b, c))
    return values


@triton.jit
def appended(values, x):
    # Triton's compiler knows no (*values, x).
    return values + (x,)  # noqa: RUF005


@triton.jit
def operation(WHICH: tl.constexpr, a, b, c):
    if WHICH == ADD:
        return a + b
    elif WHICH == SUB:
        return a - b
    elif WHICH == MUL:
        return a * b
    elif WHICH == DIV:
        return a / b
    elif WHICH == POW:
        return power(a, b)
    elif WHICH == MAXIMUM:
        return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)
    elif WHICH == MINIMUM:
        return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)
    elif WHICH == LT:
        return (a < b).to(tl.float64)
    elif WHICH == LE:
        return (a <= b).to(tl.float64)
    elif WHICH == GT:
        return (a > b).to(tl.float64)
    elif WHICH == GE:
        return (a >= b).to(tl.float64)
    elif WHICH == EQ:
        return (a == b).to(tl.float64)
    elif WHICH == NE:
        return (a != b).to(tl.float64)
    elif WHICH == WHERE:
        return tl.where(a != 0.0, b, c)
    else:
        tl.static_assert(WHICH == FLOAT32)
        return a.to(tl.float32).to(tl.float64)


@triton.jit
def power(x, y):
    """x**y. Of a negative x only whole powers exist."""
    size = tl.exp2(y * tl.log2(tl.abs(x)))
    whole = tl.floor(y) == y
    is_odd = tl.floor(0.5 * y) != 0.5 * y
    negative = tl.where(whole, tl.where(is_odd, -size, size), float("nan"))
    return tl.where(y == 0.0, 1.0, tl.where(x < 0.0, negative, size))
