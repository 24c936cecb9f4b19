"""Rows of hyperparameters that the device makes: ``capturable=True``.

Step counts, and the learning rate where it is a tensor, are on the device, and nobody waits for them. The formulas that
make a row of Python numbers are evaluated on columns instead, one small operation of torch after the other, all of
which a CUDA graph can hold. There is a row per parameter: its count is its own, whatever somebody writes to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import refresh, upload
from .buckets import Bucket
from .cohorts import Cohort
from .columns import is_column
from .options import ASIDE, RATE, Options
from .refresh import FrozenClass
from .rule import Update
from .triton_rows import Chains, Rows, structure
from .upload import Upload


class Class(NamedTuple):
    """Parameters whose groups have the same options, but for the learning rate: one evaluation serves them."""

    groups: list[dict[str, Any]]
    rows: Tensor
    """The numbers of their rows."""
    of_groups: Tensor
    """For each row its group's position among ``groups``."""
    rates: Upload
    constants: Upload


class Columns:
    """The rows of one bucket. Has the methods of ``Rows`` that the executor uses."""

    def __init__(self, bucket: Bucket, dtype: torch.dtype):
        self.bucket = bucket
        self.dtype = dtype
        self.view = Rows(bucket, dtype).view
        self.table: Tensor | None = None
        places = [m.place for m in bucket.members]
        self.spaces = list({id(place.space): place.space for place in places}.values())
        # Where each row's numbers are, among those of all spaces one after the other.
        starts = np.cumsum([0, *(len(space.sizes) for space in self.spaces)]).tolist()
        first = {id(space): start for space, start in zip(self.spaces, starts)}
        self.at = torch.tensor([first[id(place.space)] + place.index for place in places], device=bucket.device)
        self.own = [
            (space, *_indices([k for k, place in enumerate(places) if place.space is space], places, bucket.device))
            for space in self.spaces
        ]
        self.in_order = [place.index for place in places] == list(range(starts[-1]))
        """Whether the rows' numbers are those of one space, as they lie there."""
        self.options = Options([cohort.group for cohort in bucket.cohorts])
        self.alike: list[int] | None = None
        """For each group the first one with the same options and the same kind of learning rate."""
        self.classes: list[Class] = []
        self.order: Tensor | None = None
        self.before: list[Tensor] = []
        """The step counts and scalars that the latest step began with."""
        self.evaluated: list[tuple[Class, Cohort]] = []
        """The classes, each with its part of these as a cohort."""
        self.graphs: list[tuple[Chains, list[FrozenClass]]] = []
        """What CUDA graphs hold."""

    def write(self, update: Callable[[Cohort], Update], variants: int = 1) -> Chains:
        """Make the rows of the next step, of which there is one variant: the device knows which steps were skipped."""
        self.look()
        try:
            updates = [update(cohort) for _, cohort in self.evaluated]
        except KeyError as missing:
            if self.options.aside == RATE or not ASIDE.issuperset(missing.args):
                raise
            # A formula of a user's reads what schedulers keep in a group, and groups may differ in.
            self.options, self.alike = Options(self.options.groups, RATE), None
            return self.write(update)
        # Which stages there are must not depend on numbers that the host does not know.
        chains = self.view([structure(u) for u in updates])
        blocks = []
        for (one, cohort), u in zip(self.evaluated, updates):
            values = chains.columns(u)
            if self.bucket.stored.draws:
                values.append(cohort.t + 1)
            blocks.append(self._block(one, values))
        table = blocks[0] if len(blocks) == 1 else torch.cat(blocks).index_select(0, self.order)
        self.table = table.to(self.dtype)
        if upload.capturing(self.bucket.device):
            self.graphs.append((chains, [self._frozen(one) for one in self.classes]))
        return chains

    def of_graphs(self, optimizer: Any) -> Iterator[tuple[Tensor, np.ndarray]]:
        """The host's memory of numbers that CUDA graphs hold, and what belongs there now. RuntimeError where that is
        not all that has changed."""
        for chains, classes in self.graphs:
            refresh.check_rule(optimizer, self.bucket.rule, [group for one in classes for group in one.groups])
            found = [one.updates(optimizer, chains.columns) for one in classes]
            refresh.check_stages(chains, self.view([structure(u) for u, _ in found]))
            for _, told in found:
                yield from told

    def _frozen(self, one: Class) -> FrozenClass:
        """What the graph that is being captured holds of a class: the host's memory, latest in its tables."""
        is_live = "lr" not in one.groups[0] or self._is_here(one.groups[0]["lr"])
        rates = None if is_live else one.rates.frozen[-1][1]
        return FrozenClass.of(one.groups, self.options.aside, rates, one.constants.frozen[-1][1])

    def look(self) -> None:
        """Take what the formulas need as it is now."""
        self._sort()
        self.before = [self._numbers(key) for key in ("step", *self.bucket.rule.scalars)]
        counts, *scalars = self.before
        self.evaluated = [(one, self._cohort(one, counts.double(), scalars)) for one in self.classes]

    def advance(self, optimizer: Any, skip: Tensor | None) -> None:
        """Count the step that was looked at, and move the rule's scalars along; not where ``skip``, a number on the
        device, is not 0."""
        news = []
        for _, cohort in self.evaluated:
            later = optimizer.next_scalars(cohort.group, cohort.t + 1, *cohort.scalars) if cohort.scalars else ()
            news.append([cohort.t + 1, *later])
        for key, before, parts in zip(("step", *self.bucket.rule.scalars), self.before, zip(*news)):
            column = parts[0] if len(parts) == 1 else torch.cat(parts).index_select(0, self.order)
            if skip is not None:
                column = torch.where(skip != 0, before, column)
            if self.in_order:
                self.spaces[0].numbers[key].copy_(column.squeeze(1))
                continue
            column = column.to(before.dtype).squeeze(1)
            for space, rows, indices in self.own:
                space.numbers[key].index_copy_(0, indices, column.index_select(0, rows))

    def _numbers(self, key: str) -> Tensor:
        """What the parameters' states hold under that key, as a column."""
        numbers = [space.numbers[key] for space in self.spaces]
        joined = numbers[0] if len(numbers) == 1 else torch.cat(numbers)
        return joined.index_select(0, self.at).unsqueeze(1)

    def _sort(self) -> None:
        """Find the classes, if others have the same options now."""
        groups = self.options.groups
        first: dict[tuple, int] = {}
        kinds = zip(self.options.first_alike(), (self._is_here(group.get("lr")) for group in groups))
        alike = [first.setdefault(kind, k) for k, kind in enumerate(kinds)]
        if alike == self.alike:
            return
        device = self.bucket.device
        if upload.capturing(device):
            raise RuntimeError(
                "parameter groups had the same options, or different ones, until the capture of a CUDA graph: take a "
                "step with these options before capturing"
            )
        self.classes, order = [], []
        cohorts = np.array([m.cohort for m in self.bucket.members])
        for number in first.values():
            numbers = [k for k, other in enumerate(alike) if other == number]
            rows = np.flatnonzero(np.isin(cohorts, numbers))
            order.extend(rows)
            on_device = (torch.from_numpy(x).to(device) for x in (rows, np.searchsorted(numbers, cohorts[rows])))
            rates = Upload(device)
            rates.prepare(np.empty((len(numbers), 1)))  # eager steps send none where they are equal
            self.classes.append(Class([groups[k] for k in numbers], *on_device, rates, Upload(device)))
        self.order = torch.from_numpy(np.argsort(order)).to(device)
        self.alike = alike

    def _cohort(self, one: Class, counts: Tensor, scalars: Sequence[Tensor]) -> Cohort:
        """A class's numbers, for formulas."""
        if len(self.classes) > 1:
            counts, *scalars = (x.index_select(0, one.rows) for x in (counts, *scalars))
        group = self.options.among(one.groups[0])
        for key, value in group.items():
            group[key] = self._option(value)
        if "lr" in one.groups[0]:
            group["lr"] = self._rate(one)
        return Cohort(0, group, counts, tuple(scalars))

    def _rate(self, one: Class) -> Any:
        rates = [self._option(group["lr"]) for group in one.groups]
        if is_column(rates[0]):
            return rates[0] if len(rates) == 1 else torch.cat(rates).index_select(0, one.of_groups)
        # For graphs always a column, from memory that refresh() can fill again.
        if not upload.capturing(self.bucket.device) and all(rate == rates[0] for rate in rates):
            return rates[0]
        values = np.array(rates, dtype=np.float64)[:, None]
        one.rates.tell(values)
        return one.rates.device_copy.index_select(0, one.of_groups)

    def _option(self, value: Any) -> Any:
        """An option for formulas: a tensor on the device as a column, one elsewhere as a number."""
        if isinstance(value, (tuple, list)):
            return type(value)(map(self._option, value))
        if not isinstance(value, Tensor):
            return value
        return value.detach().double().reshape(1, 1) if self._is_here(value) else float(value)

    def _is_here(self, value: Any) -> bool:
        return isinstance(value, Tensor) and value.device == self.bucket.device

    def _block(self, one: Class, values: list[Any]) -> Tensor:
        """Rows of these values, some of which are columns."""
        known = np.array([[0.0 if isinstance(x, Tensor) else x for x in values]], dtype=np.float64)
        one.constants.tell(known)
        rows, constants = len(one.rows), one.constants.device_copy
        pieces = [
            (x if isinstance(x, Tensor) else constants[:, k : k + 1]).expand(rows, 1) for k, x in enumerate(values)
        ]
        return torch.cat(pieces, dim=1)


def _indices(rows: list[int], places: list[Any], device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows, and where among the numbers of their space those of each are."""
    return torch.tensor(rows, device=device), torch.tensor([places[k].index for k in rows], device=device)
