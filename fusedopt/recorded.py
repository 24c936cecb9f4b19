"""Formulas as lists of operations, for a kernel that computes what only the device knows (``kernels/numbers.py``).

A formula is called with ``Recorded`` in place of numbers. What it computes with them is not computed, but noted.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch


class Recorded:
    """A number that the device will know: the operation that makes it, and its operands.

    Operators are those of Python's numbers; ``double``, ``to``, ``clamp`` and ``where`` are what ``fusedopt.columns``
    asks of columns. Everything else, as a branch that depends on it, raises TypeError.
    """

    __slots__ = ("dtype", "name", "operands")

    __hash__ = object.__hash__

    def __init__(self, name: str, operands: tuple = (), dtype: torch.dtype = torch.float64):
        self.name = name
        self.operands = operands
        self.dtype = dtype

    def __bool__(self) -> bool:
        raise TypeError("only the device knows this number: use fusedopt.columns.where")

    def double(self) -> Recorded:
        return self.to(torch.float64)

    def to(self, dtype: torch.dtype) -> Recorded:
        if dtype == self.dtype:
            return self
        if dtype == torch.float64:
            return Recorded("same", (self,))
        if dtype == torch.float32:
            return Recorded("float32", (self,), dtype)
        raise TypeError(f"numbers of {dtype} cannot be recorded")

    def clamp(self, min: Any = None, max: Any = None) -> Recorded:
        raised = self if min is None else _operation("maximum", self, min)
        return raised if max is None else _operation("minimum", raised, max)

    def where(self, a: Any, b: Any) -> Recorded:
        """a where this is true, else b."""
        return Recorded("where", (self, _operand(a, torch.float64), _operand(b, torch.float64)))

    def __add__(self, other):
        return _operation("add", self, other)

    def __radd__(self, other):
        return _operation("add", other, self)

    def __sub__(self, other):
        return _operation("sub", self, other)

    def __rsub__(self, other):
        return _operation("sub", other, self)

    def __mul__(self, other):
        return _operation("mul", self, other)

    def __rmul__(self, other):
        return _operation("mul", other, self)

    def __truediv__(self, other):
        return _operation("div", self, other)

    def __rtruediv__(self, other):
        return _operation("div", other, self)

    def __pow__(self, other):
        return _operation("pow", self, other)

    def __rpow__(self, other):
        return _operation("pow", other, self)

    def __neg__(self):
        return _operation("sub", 0.0, self)

    def __lt__(self, other):
        return _operation("lt", self, other).double()

    def __le__(self, other):
        return _operation("le", self, other).double()

    def __gt__(self, other):
        return _operation("gt", self, other).double()

    def __ge__(self, other):
        return _operation("ge", self, other).double()

    def __eq__(self, other):
        return _operation("eq", self, other).double()

    def __ne__(self, other):
        return _operation("ne", self, other).double()


def _operation(name: str, a: Any, b: Any) -> Recorded:
    """In the wider dtype of those that are recorded, as torch's tensors have it; a number of Python's takes theirs."""
    dtypes = {x.dtype for x in (a, b) if isinstance(x, Recorded)}
    dtype = torch.float64 if torch.float64 in dtypes else torch.float32
    made = Recorded(name, (_operand(a, dtype), _operand(b, dtype)))
    # float64 of two float32, rounded, is what float32 would have given.
    return made if dtype == torch.float64 else made.to(dtype)


def _operand(x: Any, dtype: torch.dtype) -> Recorded | float:
    if isinstance(x, Recorded):
        return x
    if not isinstance(x, (int, float, np.number)):
        raise TypeError(f"{type(x).__name__} cannot be recorded")
    return float(x) if dtype == torch.float64 else float(np.float32(x))


class Program(NamedTuple):
    """What ``kernels/numbers.py`` is given."""

    operations: tuple
    """Flat: of each its name and which three values it takes."""
    outputs: tuple[int, ...]
    """Which values are asked for."""
    constants: list[float]
    """First one for each output: its number if it is no more than that, else 0. Then those that operations take."""


def program(inputs: Sequence[Recorded], outputs: Sequence[Any]) -> Program:
    """The operations that make ``outputs``, some of which may be numbers, of ``inputs``. Which there are does not
    depend on the values of constants."""
    needed: list[Recorded] = []
    seen = set(map(id, inputs))

    def look(x: Any) -> None:
        if isinstance(x, Recorded) and id(x) not in seen:
            seen.add(id(x))
            for operand in x.operands:
                look(operand)
            needed.append(x)

    for x in outputs:
        look(x)
    constants = [0.0 if isinstance(x, Recorded) else float(x) for x in outputs]
    places_of_constants = itertools.count(len(inputs) + len(constants))
    constants += [y for x in needed for y in x.operands if not isinstance(y, Recorded)]
    place = {id(x): k for k, x in enumerate(inputs)}
    operations: list = []
    end = len(inputs) + len(constants)
    for x in needed:
        taken = [place[id(y)] if isinstance(y, Recorded) else next(places_of_constants) for y in x.operands]
        if x.name == "same":
            place[id(x)] = taken[0]
            continue
        place[id(x)] = end
        end += 1
        operations += [x.name, *taken, *([0] * (3 - len(taken)))]
    found = [place[id(x)] if isinstance(x, Recorded) else len(inputs) + k for k, x in enumerate(outputs)]
    return Program(tuple(operations), tuple(found), constants)
