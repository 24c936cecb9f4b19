"""The numbers of a step that only the device knows, made by one kernel: see kernels/numbers.py."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .buckets import Bucket
from .cohorts import Cohort
from .kernels import numbers
from .launch import Launches
from .recorded import Recorded, program
from .triton_tables import TYPES
from .upload import Upload

EXACT = {torch.float32, torch.float64}
"""Dtypes of numbers that the kernel reads."""

BLOCK = 128
"""Rows per program."""


class Family(NamedTuple):
    """Parameters whose groups have the same options, but for the learning rate: one evaluation serves them."""

    groups: list[dict[str, Any]]
    members: Tensor
    """int64 [parameters, 2]: their rows, and for each its group's position among ``groups``."""
    rates: Upload
    options: Upload
    constants: Upload
    later: Upload
    """The constants of what comes after the step."""

    @classmethod
    def of(cls, groups: list[dict[str, Any]], members: Tensor) -> Family:
        one = cls(groups, members, *(Upload(members.device) for _ in range(4)))
        one.rates.prepare(np.empty((len(groups), 1)))  # eager steps may send none
        return one

    @property
    def rows(self) -> Tensor:
        return self.members[:, 0]

    @property
    def of_groups(self) -> Tensor:
        return self.members[:, 1]

    @property
    def is_live(self) -> bool:
        """Whether their learning rates are read from tensors on the device."""
        return is_on(self.groups[0]["lr"], self.members.device)


def is_on(value: Any, device: torch.device) -> bool:
    """Whether it is a tensor on that device."""
    return isinstance(value, Tensor) and value.device == device


def for_formulas(value: Any, device: torch.device, read: Callable[[Tensor], Any]) -> Any:
    """An option for formulas: a tensor on the device as what ``read`` makes of it, one elsewhere as a number."""
    if isinstance(value, (tuple, list)):
        return type(value)(for_formulas(x, device, read) for x in value)
    if not isinstance(value, Tensor):
        return value
    return read(value) if is_on(value, device) else float(value)


def can_record(bucket: Bucket) -> bool:
    """Whether the kernel can read and write the step counts and scalars of these parameters."""
    return all(len(dtypes) == 1 and dtypes <= EXACT for dtypes in _dtypes(bucket))


def _dtypes(bucket: Bucket) -> list[set[torch.dtype]]:
    spaces = {m.place.space for m in bucket.members}
    return [{space.numbers[key].dtype for space in spaces} for key in ("step", *bucket.rule.scalars)]


class Recording:
    """What a formula is told of one family at one step."""

    def __init__(self, one: Family, dtypes: Sequence[torch.dtype]):
        self.states = [Recorded("state", (), dtype) for dtype in dtypes]
        self.options: list[Recorded] = []
        self.dtypes: list[torch.dtype] = []
        self.addresses: list[list[int]] = []
        """Of each option, for each group."""
        self.one = one
        self.device = one.members.device

    def option(self, value: Any) -> Any:
        """An option of all groups, for formulas."""
        return for_formulas(value, self.device, lambda tensor: self._read([tensor] * len(self.one.groups)))

    def rate(self) -> Recorded:
        """Their learning rates."""
        rates = [group["lr"] for group in self.one.groups]
        if self.one.is_live:
            return self._read(rates)
        # Also where all are the same, from memory that refresh() can fill again.
        self.one.rates.tell(np.array(list(map(float, rates)))[:, None])
        table = self.one.rates.device_copy
        # Without a view for each of hundreds of groups.
        return self._read_at(
            table.dtype, list(range(table.data_ptr(), table.data_ptr() + table.nbytes, table.itemsize))
        )

    def _read(self, tensors: Sequence[Tensor]) -> Recorded:
        dtype = tensors[0].dtype
        if any(x.dtype != dtype or x.device != self.device or x.numel() != 1 for x in tensors) or dtype not in EXACT:
            raise TypeError("the kernel reads single numbers of one dtype, float32 or float64")
        return self._read_at(dtype, list(map(Tensor.data_ptr, tensors)))

    def _read_at(self, dtype: torch.dtype, addresses: list[int]) -> Recorded:
        self.dtypes.append(dtype)
        self.addresses.append(addresses)
        self.options.append(Recorded("option", (), dtype))
        return self.options[-1].double()

    @functools.cached_property
    def table(self) -> Tensor | None:
        """The addresses, on the device."""
        if not self.addresses:
            return None
        self.one.options.tell(np.array(self.addresses, dtype=np.int64).T.copy())
        return self.one.options.device_copy


class Programs:
    """Evaluates formulas by a kernel, which is given their operations. Formulas get ``Recorded`` for columns."""

    def __init__(self, bucket: Bucket, dtype: torch.dtype, launch: Launches):
        self.launch = launch
        self.dtype = dtype
        self.dtypes = [dtype for (dtype,) in _dtypes(bucket)]
        keys = ("step", *bucket.rule.scalars)
        addresses = [[_address(m.place.space.numbers[key], m.place.index) for key in keys] for m in bucket.members]
        self.states = torch.tensor(addresses, dtype=torch.int64, device="cpu").to(bucket.device)
        self.recordings: dict[int, Recording] = {}
        """Of the latest step, by family."""

    def look(self) -> None:
        self.recordings.clear()

    def cohort(self, one: Family, group: dict[str, Any]) -> Cohort:
        """A family's numbers, for formulas: ``group`` has its options but for the learning rate."""
        recording = self.recordings[id(one)] = Recording(one, self.dtypes)
        for key, value in group.items():
            group[key] = recording.option(value)
        if "lr" in one.groups[0]:
            group["lr"] = recording.rate()
        counts, *scalars = recording.states
        return Cohort(0, group, counts.double(), tuple(scalars))

    def table(self, rows: Sequence[tuple[Family, list[Any]]]) -> Tensor:
        """The rows of these values, some of which are recorded."""
        size = sum(len(one.members) for one, _ in rows), len(rows[0][1])
        table = torch.empty(size, dtype=self.dtype, device=self.states.device)
        for one, values in rows:
            self._launch(numbers.write_rows, table, one, one.constants, values)
        return table

    def advance(self, news: Sequence[tuple[Family, list[Any]]], verdict: Tensor | None) -> None:
        """Put into the states what they hold after the step."""
        for one, values in news:
            self._launch(numbers.advance, verdict, one, one.later, values)

    def _launch(self, kernel: Any, first: Tensor | None, one: Family, constants: Upload, values: list[Any]) -> None:
        recording = self.recordings[id(one)]
        made = program([*recording.states, *recording.options], values)
        operations = tuple(getattr(numbers, x.upper()).value if isinstance(x, str) else x for x in made.operations)
        variant = first is None, operations, made.outputs, len(made.constants), *recording.dtypes
        constants.tell(np.array([made.constants]))
        count = len(one.members)
        self.launch(
            kernel, variant, -(-count // BLOCK), first, one.members, self.states, recording.table,
            constants.device_copy, count,
            STATES=_types(self.dtypes), TENSORS=_types(recording.dtypes), CONSTANTS=len(made.constants),
            PROGRAM=operations, OUTPUTS=made.outputs, BLOCK=BLOCK, enable_fp_fusion=False,
        )  # fmt: skip


def _address(numbers: Tensor, index: int) -> int:
    return numbers.data_ptr() + index * numbers.itemsize


def _types(dtypes: Sequence[torch.dtype]) -> tuple:
    return tuple(TYPES[dtype] for dtype in dtypes)
