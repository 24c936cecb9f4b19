"""Parameters that share all their numbers: one row of hyperparameters serves them.

They belong to one group, have been stepped equally often, and agree in the numbers that torch keeps for each parameter
beside its step count (``Rule.scalars``).
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .flat import Space
from .rule import Rule


class Scalar(NamedTuple):
    """One number that torch keeps as a 0-dim tensor, rounded to that tensor's dtype; the tensor, if it is on a device
    which nobody waits for."""

    value: float | Tensor
    dtype: torch.dtype

    @classmethod
    def rounded(cls, value: float | Tensor, dtype: torch.dtype) -> Scalar:
        if isinstance(value, Tensor):
            return cls(value, dtype)
        return cls(torch.tensor(value, dtype=dtype, device="cpu").item(), dtype)

    def tensor(self) -> Tensor:
        return torch.tensor(self.value, dtype=self.dtype, device="cpu")


@dataclasses.dataclass(slots=True, eq=False)
class Cohort:
    """The parameters of one group that have been stepped equally often; all of a group, if only the device knows how
    often."""

    number: int
    group: dict[str, Any]
    t: int
    """Steps taken."""
    scalars: tuple[Tensor, ...] = ()
    """The rule's scalars after them, in the dtypes of the parameters' states."""
    earlier: tuple[Tensor, ...] = ()
    """The same one step earlier."""
    members: list[Any] = dataclasses.field(default_factory=list)
    slots: list[tuple[Space, Tensor]] = dataclasses.field(default_factory=list)
    """Where the members' scalars stand: indices into the numbers of each space."""

    def find_slots(self) -> None:
        indices: dict[Space, list[int]] = {}
        for m in self.members:
            indices.setdefault(m.place.space, []).append(m.place.index)
        self.slots = [(space, torch.tensor(places, device="cpu")) for space, places in indices.items()]

    def turn(self, optimizer: Any, rule: Rule, by: int) -> None:
        """Count ``by`` steps, and move the scalars along, in the members' states too: forwards one step, or back the
        latest one."""
        self.t += by
        if not rule.scalars:
            return
        if by > 0:
            now = optimizer.next_scalars(self.group, self.t, *self.scalars)
            rounded = (x.to(y.dtype) for x, y in zip(now, self.scalars))
            self.scalars, self.earlier = tuple(rounded), self.scalars
        else:
            self.scalars = self.earlier
        for space, indices in self.slots:
            for key, scalar in zip(rule.scalars, self.scalars):
                space.numbers[key].index_fill_(0, indices, scalar)
