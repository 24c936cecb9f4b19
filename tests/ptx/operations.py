"""What instructions make of registers' bits, for all threads at once.

Registers hold unsigned integers: the bits, whatever an instruction takes them for.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np

UNSIGNED = {1: np.bool_, 8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}


@functools.cache
def bits_of(kind: str) -> int:
    """The size of a type; of a register's, if it is one of bits."""
    if kind.endswith("x2"):
        return 2 * bits_of(kind[:-2])
    return {"pred": 1, "bf16": 16}.get(kind) or int(kind[1:])


def read(raw: np.ndarray, kind: str) -> np.ndarray:
    """The numbers that bits stand for. bfloat16 are taken into float32."""
    if kind == "pred":
        return raw
    if kind == "bf16":
        return (raw.astype(np.uint32) << 16).view(np.float32)
    size = bits_of(kind)
    raw = raw.astype(UNSIGNED[size], copy=False)
    return raw if kind[0] in "bu" else raw.view({"s": "int", "f": "float"}[kind[0]] + str(size))


def write(value: np.ndarray, kind: str) -> np.ndarray:
    """And the other way round."""
    if kind == "pred":
        return value.astype(np.bool_)
    if kind == "bf16":
        return to_bfloat16(value)
    number = {"s": "int", "f": "float", "u": "uint", "b": "uint"}[kind[0]] + str(bits_of(kind))
    return np.ascontiguousarray(value.astype(number, copy=False)).view(UNSIGNED[bits_of(kind)])


def to_bfloat16(value: np.ndarray) -> np.ndarray:
    """Bits of the nearest bfloat16, to even, of float32."""
    raw = value.astype(np.float32).view(np.uint32)
    rounded = (raw.astype(np.uint64) + 0x7FFF + ((raw >> 16) & 1)) >> 16
    return np.where(np.isnan(value), 0x7FFF, rounded).astype(np.uint16)


def halves(raw: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The two numbers in one register: the lower, the upper."""
    half = UNSIGNED[raw.dtype.itemsize * 4]
    return raw.astype(half), (raw >> (raw.dtype.type(raw.dtype.itemsize * 4))).astype(half)


def joined(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    size = low.dtype.itemsize * 8
    whole = UNSIGNED[2 * size]
    return low.astype(whole) | (high.astype(whole) << whole(size))


def smaller(a: np.ndarray, b: np.ndarray, spreads_nan: bool) -> np.ndarray:
    """The minimum: a NaN gives way to a number, or not; -0 is below +0."""
    if a.dtype.kind != "f":
        return np.minimum(a, b)
    found = np.minimum(a, b) if spreads_nan else np.fmin(a, b)
    return np.where((a == 0) & (b == 0) & (np.signbit(a) | np.signbit(b)), -np.zeros_like(a), found)


def larger(a: np.ndarray, b: np.ndarray, spreads_nan: bool) -> np.ndarray:
    return np.maximum(a, b) if a.dtype.kind != "f" else -smaller(-a, -b, spreads_nan)


def quotient(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a / b; of whole numbers rounded towards zero, and 0 for threads that must not divide by 0."""
    if a.dtype.kind == "f":
        return a / b
    b = np.where(b == 0, 1, b).astype(a.dtype)
    found = np.abs(a) // np.abs(b)
    return np.where((a < 0) != (b < 0), -found, found).astype(a.dtype)


def remainder(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a - quotient(a, b) * b).astype(a.dtype)


def shifted(a: np.ndarray, by: np.ndarray, left: bool) -> np.ndarray:
    size = a.dtype.itemsize * 8
    amount = np.minimum(by, size - 1).astype(a.dtype)
    found = a << amount if left else a >> amount
    # Beyond its size nothing is left of a number, but for the sign.
    return found if a.dtype.kind == "i" else np.where(by >= size, 0, found).astype(a.dtype)


def field(a: np.ndarray, start: np.ndarray, length: np.ndarray) -> np.ndarray:
    """Some bits of a number, with the sign of their highest one if it is signed."""
    size = a.dtype.itemsize * 8
    up = (size - start - length).astype(a.dtype)
    return (a << up) >> (size - length).astype(a.dtype)


def permuted(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    """Four of the eight bytes of b and a, or what repeats their sign."""
    both = b.astype(np.uint64) << 32 | a
    found = np.zeros_like(a)
    for k in range(4):
        chosen = (selector >> (4 * k)) & 15
        byte = (both >> ((chosen & 7).astype(np.uint64) * 8)).astype(np.uint32) & 255
        byte = np.where(chosen & 8, np.where(byte & 128, 255, 0), byte).astype(np.uint32)
        found |= byte << (8 * k)
    return found


def multiplied_and_added(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a b + c, rounded once: in extended precision, whose own rounding could be seen only where 64 bits are too few."""
    return (a.astype(np.longdouble) * b + c).astype(a.dtype)


def compared(a: np.ndarray, b: np.ndarray, how: str) -> np.ndarray:
    if how in ("nan", "num"):
        return (np.isnan(a) | np.isnan(b)) == (how == "nan")
    if a.dtype.kind != "f":
        return COMPARED[how](a, b)
    found = COMPARED[how[:2]](a, b)
    either = np.isnan(a) | np.isnan(b)
    return found | either if len(how) == 3 else found & ~either


def converted(value: np.ndarray, rounding: tuple[str, ...], kind: str) -> np.ndarray:
    if kind[0] in "su" and value.dtype.kind == "f":
        limits = np.iinfo({"s": "int", "u": "uint"}[kind[0]] + kind[1:])
        whole = np.trunc(value) if "rzi" in rounding else np.rint(value)
        return np.where(np.isnan(value), 0, np.clip(whole.astype(np.float64), limits.min, limits.max)).astype(np.int64)
    if "rmi" in rounding:
        return np.floor(value)
    return value.astype(np.float32) if kind == "bf16" else value


def reciprocal(a: np.ndarray) -> np.ndarray:
    """Of float64 in its upper half only, as the hardware's."""
    return (1 / a).view(np.uint64) & np.uint64(0xFFFFFFFF00000000)


UNARY: dict[str, Callable] = {
    "neg": np.negative, "not": np.invert, "abs": np.abs, "sqrt": np.sqrt, "rcp": lambda a: reciprocal(a).view(a.dtype),
}  # fmt: skip
BINARY: dict[str, Callable] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "div": quotient, "rem": remainder,
    "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
}  # fmt: skip

COMPARED: dict[str, Callable] = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
}  # fmt: skip
