"""Parameters that share all their numbers: one row of hyperparameters serves them.

They belong to one group, have been stepped equally often, and agree in the numbers that torch keeps for each parameter
beside its step count (``Rule.scalars``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence, Set
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .columns import NUMPY, Rounded, joined, like, scalar
from .flat import Space
from .options import NOT_READ, Options
from .rule import Rule, Update


class Scalar(NamedTuple):
    """A number that torch keeps for a parameter in a 0-dim tensor: rounded to that tensor's dtype, or the tensor itself
    where it is on a device for which nobody waits."""

    value: float | Tensor
    dtype: torch.dtype

    @classmethod
    def rounded(cls, value: float | Tensor, dtype: torch.dtype) -> Scalar:
        if isinstance(value, Tensor):
            return cls(value, dtype)
        return cls(torch.tensor(value, dtype=dtype, device="cpu").item(), dtype)

    def number(self) -> Rounded:
        return scalar(self.value, self.dtype)


@dataclasses.dataclass(slots=True, eq=False)
class Cohort:
    """The parameters of one group that have been stepped equally often; all of a group, if only the device knows how
    often."""

    number: int
    group: dict[str, Any]
    t: int
    """Steps taken."""
    scalars: tuple[Rounded, ...] = ()
    """The rule's scalars after them, in the dtypes of the parameters' states."""
    earlier: tuple[Rounded, ...] = ()
    """The same one step earlier."""
    members: list[Any] = dataclasses.field(default_factory=list)

    def turn(self, optimizer: Any, forwards: bool) -> None:
        """Move the scalars along with the count: forwards one step, or back the latest one."""
        if forwards:
            now = optimizer.next_scalars(self.group, self.t, *self.scalars)
            self.scalars, self.earlier = tuple(map(like, now, self.scalars)), self.scalars
        else:
            self.scalars = self.earlier


def alike(cohorts: Sequence[Cohort], aside: Set[str] = NOT_READ) -> list[list[Cohort]]:
    """Cohorts whose groups have the same options, the learning rate among them: all their numbers are the same, for as
    long as that stays so (``Groups``). With ``aside`` = ``ASIDE`` their learning rates may differ."""
    found: dict[tuple, list[Cohort]] = {}
    for cohort, first in zip(cohorts, Options([cohort.group for cohort in cohorts], aside).first_alike()):
        scalars = tuple([(x.item(), x.dtype) for x in cohort.scalars])
        found.setdefault((first, cohort.t, scalars), []).append(cohort)
    return list(found.values())


class StepNumbers:
    """The numbers of one step, which a cohort takes from its group, its count and its scalars."""

    def __init__(self, optimizer: Any):
        self.optimizer = optimizer
        decay = optimizer._settings.ema_decay
        self.last = () if decay is None else (1 - decay,)

    def __call__(self, cohort: Cohort, skipped: int = 0) -> Update:
        """All numbers of a cohort, if ``skipped`` more steps were skipped than the host knows of."""
        scalars = cohort.earlier if skipped else cohort.scalars
        update = self.optimizer.update(cohort.group, cohort.t + (1 - skipped), *scalars)
        return update._replace(averages=(*update.averages, *self.last)) if self.last else update


class StoredScalars:
    """Where the scalars of a bucket's parameters stand in their states."""

    def __init__(self, rule: Rule, cohorts: Sequence[Cohort]):
        self.cohorts = cohorts
        found: dict[Space, list[tuple[int, int]]] = {}
        for cohort in cohorts:
            for m in cohort.members:
                found.setdefault(m.place.space, []).append((m.place.index, cohort.number))
        self.places = [
            [(_writable(space, key), *np.array(pairs).T) for space, pairs in found.items()] for key in rule.scalars
        ]
        """By scalar and space: its numbers, indices into them, and the cohort of each."""

    def write(self) -> None:
        """Put the cohorts' scalars there."""
        for places, column in zip(self.places, zip(*[cohort.scalars for cohort in self.cohorts])):
            for numbers, indices, cohorts in places:
                if len(column) > 1:
                    numbers[indices] = joined(column)[cohorts]
                elif len(indices) == len(numbers):
                    numbers[:] = column[0]
                else:
                    numbers[indices] = column[0]


def _writable(space: Space, key: str) -> np.ndarray | Tensor:
    """A space's scalars as an array, where NumPy has their dtype."""
    numbers = space.numbers[key]
    # Another array of torch's memory would count as one more use of it: see ``Space.storages``.
    return space.arrays[key].view(NUMPY[numbers.dtype]) if numbers.dtype in NUMPY else numbers
