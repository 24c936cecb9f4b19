"""Where the data is: ``address(record, roles, ALIGNED) -> Tensors`` for the tensor of one record.

The table has one record of int64 fields per tensor::

    numel, row of hyperparameters, aligned or not, gradient, parameter, states ..., averages ...

Gradients always are addresses, since autograd owns them. With ``scattered`` every other role is an
address too; with ``flat`` the parameter's field holds the position in flat buffers, one per role.
"""

from typing import NamedTuple

import triton
import triton.language as tl

NUMEL = tl.constexpr(0)
ROW = tl.constexpr(1)
IS_ALIGNED = tl.constexpr(2)
GRAD = tl.constexpr(3)
PARAM = tl.constexpr(4)


class Tensors(NamedTuple):
    param: object
    grad: object
    states: tuple
    averages: tuple


class Role(NamedTuple):
    """One role of ``scattered`` tensors: the field of its address, and its dtype."""

    field: object
    dtype: object


@triton.jit
def scattered(record, roles, ALIGNED: tl.constexpr):
    return Tensors(
        at(record, roles.param, ALIGNED),
        at(record, roles.grad, ALIGNED),
        tl.tuple([at(record, role, ALIGNED) for role in roles.states]),
        tl.tuple([at(record, role, ALIGNED) for role in roles.averages]),
    )


@triton.jit
def flat(record, roles, ALIGNED: tl.constexpr):
    # Tensors start at multiples of 256 elements, so one hint serves every dtype.
    position = tl.multiple_of(tl.load(record + PARAM), 256)
    return Tensors(
        roles.param + position,
        at(record, roles.grad, ALIGNED),
        tl.tuple([base + position for base in roles.states]),
        tl.tuple([base + position for base in roles.averages]),
    )


@triton.jit
def at(record, role, ALIGNED: tl.constexpr):
    pointer = tl.load(record + role.field).to(tl.pointer_type(role.dtype))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer
