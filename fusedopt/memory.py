"""How many bytes an optimizer will need, before it has stepped."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .groups import params_of
from .optimizer import FusedOptimizer
from .sgd import SGD
from .storage import MASTERS, NARROW, storage

STATE_DTYPES = (None, torch.float32, torch.bfloat16, "8bit")


class Memory(NamedTuple):
    """Bytes per parameter under one choice of ``master`` and ``state_dtype``, on average over all parameters."""

    master: str | None
    state_dtype: Any
    parameters: float
    gradients: float
    states: float
    masters: float
    chosen: bool
    """Whether it is the choice that was asked about."""

    @property
    def total(self) -> float:
        """Their sum."""
        return self.parameters + self.gradients + self.states + self.masters


class MemoryTable(list):
    """Rows of ``Memory``; printed as a table, in which a star marks the choice that was asked about."""

    def __str__(self) -> str:
        names = ("parameters", "gradients", "states", "masters", "total")
        lines = [f"  {'master':12} {'state_dtype':12}" + "".join(f"{name:>12}" for name in names)]
        for row in self:
            dtype = str(row.state_dtype).removeprefix("torch.")
            numbers = "".join(f"{getattr(row, name):12.2f}" for name in names)
            lines.append(f"{'*' if row.chosen else ' '} {row.master!s:12} {dtype:12}{numbers}")
        return "\n".join(lines)

    __repr__ = __str__


def memory(
    model: torch.nn.Module | Iterable[Any], optimizer: type[FusedOptimizer] | FusedOptimizer, **options: Any
) -> MemoryTable:
    """Bytes per parameter for parameters, gradients, states and masters, for every ``master`` and ``state_dtype``.

    Nothing is allocated. Gradients count in the parameters' dtype, buffers of the allocator and of a step do not count.

    Args:
        model: a module, or what the optimizer would be given as ``params``. Of an instance of an optimizer, which has
            its parameters already, it must hold them all; what else it holds does not count.
        optimizer: a class of fusedopt, or an instance of one.
        options: the class's arguments, if a class is given.

    Raises:
        TypeError: for anything but an optimizer of fusedopt, and for options beside an instance.
        ValueError: for an instance that updates parameters of another model.

    Example::

        print(fusedopt.memory(model, fusedopt.AdamW, state_dtype="8bit"))
    """
    params = model.parameters() if isinstance(model, torch.nn.Module) else model
    if isinstance(optimizer, type) and issubclass(optimizer, FusedOptimizer):
        made = optimizer(params, **options)
    elif isinstance(optimizer, FusedOptimizer):
        if options:
            raise TypeError(f"{', '.join(options)}: an optimizer that is made already has its options")
        _check_holds(params, optimizer)
        made = optimizer
    else:
        raise TypeError(f"memory takes an optimizer of fusedopt or its class, got {optimizer!r}")
    entries = [(p, made.rule(group)) for group in made.param_groups for p in group["params"] if p.requires_grad]
    narrow = any(p.dtype in NARROW for p, _ in entries)
    half = any(p.dtype is torch.float16 for p, _ in entries)
    masters = [m for m in MASTERS if narrow and not (half and m.startswith("split"))]
    state_dtypes = STATE_DTYPES if any(rule.keys for _, rule in entries) else (None,)
    settings = copy.copy(made._settings)
    rows = MemoryTable()
    for master, state_dtype in itertools.product([None, *masters], state_dtypes):
        settings.master, settings.state_dtype = master, state_dtype
        chosen = (master, state_dtype) == (made.master, made.state_dtype)
        rows.append(Memory(master, state_dtype, *_bytes(entries, settings), chosen))
    return rows


def _check_holds(params: Iterable[Any], optimizer: FusedOptimizer) -> None:
    theirs = set(params_of(SGD(params)))
    missing = [p for p in params_of(optimizer) if p not in theirs]
    if missing:
        raise ValueError(
            f"the model lacks {len(missing)} of the parameters that this {type(optimizer).__name__} updates, the first "
            f"of shape {tuple(missing[0].shape)}: give the model that it was made for"
        )


def _bytes(entries: list[tuple[Tensor, Any]], settings: Any) -> tuple[float, float, float, float]:
    elements = sum(p.numel() for p, _ in entries) or 1
    parameters = sum(p.numel() * p.itemsize for p, _ in entries)
    stored = [(p, storage(p, rule, settings, {})) for p, rule in entries]
    states = sum(_size(p, form.parts) for p, s in stored for _, form in (*s.kept, *s.beside))
    masters = sum(_size(p, s.param.parts[1:]) for p, s in stored)
    return parameters / elements, parameters / elements, states / elements, masters / elements


def _size(p: Tensor, parts: Iterable[Any]) -> int:
    return sum(-(-p.numel() // part.per) * part.dtype.itemsize for part in parts)
