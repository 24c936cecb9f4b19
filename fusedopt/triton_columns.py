"""Rows of hyperparameters that the device makes: ``capturable=True``.

Step counts, and the learning rate where it is a tensor, are on the device, and nobody waits for them. The formulas that
make a row of Python numbers are evaluated on columns instead, by what a CUDA graph can hold: one kernel
(triton_programs.py) or, where a formula asks for more than that can do, one small operation of torch after the other.
There is a row per parameter: its count is its own, whatever somebody writes to it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import refresh, upload
from .buckets import Bucket
from .cohorts import Cohort, StepNumbers
from .columns import is_column
from .launch import Launches
from .options import ASIDE, RATE, Options
from .refresh import FrozenFamily
from .triton_programs import Family, Programs, can_record, for_formulas, is_on
from .triton_rows import Chains, Rows, structure


class Columns:
    """The rows of one bucket. Has the methods of ``Rows`` that the executor uses."""

    def __init__(self, bucket: Bucket, dtype: torch.dtype, launch: Launches):
        self.bucket = bucket
        self.dtype = dtype
        self.view = Rows(bucket, dtype).view
        self.table: Tensor | None = None
        self.way: Programs | Operations
        """What evaluates the formulas."""
        self.way = Programs(bucket, dtype, launch) if can_record(bucket) else Operations(bucket, dtype)
        self.options = Options([cohort.group for cohort in bucket.cohorts])
        self.alike: list[int] | None = None
        """For each group the first one with the same options and the same kind of learning rate."""
        self.families: list[Family] = []
        self.evaluated: list[tuple[Family, Cohort]] = []
        """The families and what formulas are told of them."""
        self.graphs: list[tuple[Chains, list[FrozenFamily]]] = []
        """What CUDA graphs hold."""
        self.read_by_graphs: list[Any] = []
        """What owns the memory that they read: kept here where later steps replace it."""

    def write(self, update: StepNumbers, variants: int = 1) -> Chains:
        """Make the rows of the next step, of which there is one variant: the device knows which steps were skipped."""
        self.look()
        updates = self._evaluate(update)
        # Which stages there are must not depend on numbers that the host does not know.
        chains = self.view([structure(u) for u in updates])
        rows = []
        for (one, cohort), u in zip(self.evaluated, updates):
            values = chains.columns(u)
            if self.bucket.stored.draws:
                values.append(cohort.t + 1)
            rows.append((one, values))
        self.table = self.way.table(rows)
        if upload.capturing(self.bucket.device):
            self.graphs.append((chains, [self._frozen(one, chains.width) for one in self.families]))
            self.read_by_graphs += [self.way, *self.families]
        return chains

    def _evaluate(self, formula: Callable[[Cohort], Any]) -> list[Any]:
        """What a formula makes of each family that was looked at."""
        try:
            return [formula(cohort) for _, cohort in self.evaluated]
        except Exception as problem:
            reads_aside = isinstance(problem, KeyError) and ASIDE.issuperset(problem.args)
            if reads_aside and self.options.aside != RATE:
                # A formula of a user's reads what schedulers keep in a group, and groups may differ in.
                self.options, self.alike = Options(self.options.groups, RATE), None
            elif isinstance(self.way, Programs):
                self.way = Operations(self.bucket, self.dtype)
            else:
                raise
        self.look()
        return self._evaluate(formula)

    def of_graph(self, optimizer: Any, graph: tuple[Chains, list[FrozenFamily]]) -> list[tuple[Tensor, np.ndarray]]:
        """The host's memory of numbers that a CUDA graph holds, and what belongs there now. RuntimeError where that is
        not all that has changed."""
        chains, families = graph
        refresh.check_rule(optimizer, self.bucket.rule, [group for one in families for group in one.groups])
        found = [one.updates(optimizer, chains.columns) for one in families]
        refresh.check_stages(chains, self.view([structure(u) for u, _ in found]))
        return [pair for _, told in found for pair in told]

    def _frozen(self, one: Family, width: int) -> FrozenFamily:
        """What the graph that is being captured holds of a family: the host's memory, latest in its tables."""
        options = self.options.in_common(one.groups[0])
        options = {key: for_formulas(x, self.bucket.device, lambda tensor: tensor) for key, x in options.items()}
        has_rates = "lr" in one.groups[0]
        live = [group["lr"] for group in one.groups] if has_rates and one.is_live else None
        rates = one.rates.frozen[-1][1] if has_rates and not one.is_live else None
        constants = one.constants.frozen[-1][1][:, :width]
        return FrozenFamily(one.groups, self.options.aside, options, live, rates, constants)

    def look(self) -> None:
        """Take what the formulas need as it is now."""
        self._sort()
        try:
            self._tell()
        except TypeError:
            if not isinstance(self.way, Programs):
                raise
            # A learning rate of another dtype than the kernel reads, say.
            self.way = Operations(self.bucket, self.dtype)
            self._tell()

    def _tell(self) -> None:
        self.way.look()
        self.evaluated = [(one, self.way.cohort(one, self.options.in_common(one.groups[0]))) for one in self.families]

    def advance(self, optimizer: Any, verdict: Tensor | None) -> None:
        """Count the step that was written, and move the rule's scalars along; not where the verdict on the device skips
        it."""

        def later(cohort: Cohort) -> list[Any]:
            t = cohort.t + 1
            return [t, *(optimizer.next_scalars(cohort.group, t, *cohort.scalars) if cohort.scalars else ())]

        news = self._evaluate(later)
        self.way.advance([(one, values) for (one, _), values in zip(self.evaluated, news)], verdict)

    def foresee(self, optimizer: Any, verdict: Tensor | None) -> None:
        """Go through the launch of ``advance``, which ``launch`` leaves to be compiled."""
        if isinstance(self.way, Programs):
            self.advance(optimizer, verdict)

    def _sort(self) -> None:
        """Find the families, if others have the same options now."""
        groups, device = self.options.groups, self.bucket.device
        first: dict[tuple, int] = {}
        kinds = zip(self.options.first_alike(), (is_on(group.get("lr"), device) for group in groups))
        alike = [first.setdefault(kind, k) for k, kind in enumerate(kinds)]
        if alike == self.alike:
            return
        if upload.capturing(device):
            raise RuntimeError(
                "parameter groups had the same options, or different ones, until the capture of a CUDA graph: take a "
                "step with these options before capturing"
            )
        cohorts = np.array([m.cohort for m in self.bucket.members])
        self.families = []
        for number in first.values():
            numbers = [k for k, other in enumerate(alike) if other == number]
            rows = np.flatnonzero(np.isin(cohorts, numbers))
            members = np.stack([rows, np.searchsorted(numbers, cohorts[rows])], axis=1)
            self.families.append(Family.of([groups[k] for k in numbers], torch.from_numpy(members).to(device)))
        self.alike = alike


class Operations:
    """Evaluates formulas by operations of torch, on columns."""

    def __init__(self, bucket: Bucket, dtype: torch.dtype):
        self.bucket = bucket
        self.dtype = dtype
        self.keys = ("step", *bucket.rule.scalars)
        places = [m.place for m in bucket.members]
        self.spaces = list(dict.fromkeys(place.space for place in places))
        # Where each row's numbers are, among those of all spaces one after the other.
        starts = np.cumsum([0, *(len(space.sizes) for space in self.spaces)]).tolist()
        first = dict(zip(self.spaces, starts))
        self.at = torch.tensor([first[place.space] + place.index for place in places], device=bucket.device)
        self.own = [
            (space, *_indices([k for k, place in enumerate(places) if place.space is space], places, bucket.device))
            for space in self.spaces
        ]
        self.in_order = [place.index for place in places] == list(range(starts[-1]))
        """Whether the rows' numbers are those of one space, as they lie there."""
        self.before: list[Tensor] = []
        """The step counts and scalars that the latest step began with."""

    def look(self) -> None:
        self.before = [self._numbers(key) for key in self.keys]

    def _numbers(self, key: str) -> Tensor:
        """What the parameters' states hold under that key, as a column."""
        numbers = [space.numbers[key] for space in self.spaces]
        joined = numbers[0] if len(numbers) == 1 else torch.cat(numbers)
        return joined.index_select(0, self.at).unsqueeze(1)

    def cohort(self, one: Family, group: dict[str, Any]) -> Cohort:
        """A family's numbers, for formulas: ``group`` has its options but for the learning rate."""
        counts, *scalars = self.before
        if len(one.members) < len(self.at):
            counts, *scalars = (x.index_select(0, one.rows) for x in (counts, *scalars))
        for key, value in group.items():
            group[key] = self._option(value)
        if "lr" in one.groups[0]:
            group["lr"] = self._rate(one)
        return Cohort(0, group, counts.double(), tuple(scalars))

    def _rate(self, one: Family) -> Any:
        rates = [self._option(group["lr"]) for group in one.groups]
        if is_column(rates[0]):
            return rates[0] if len(rates) == 1 else torch.cat(rates).index_select(0, one.of_groups)
        # For graphs always a column, from memory that refresh() can fill again.
        if not upload.capturing(self.bucket.device) and all(rate == rates[0] for rate in rates):
            return rates[0]
        one.rates.tell(np.array(rates, dtype=np.float64)[:, None])
        return one.rates.device_copy.index_select(0, one.of_groups)

    def _option(self, value: Any) -> Any:
        """An option for formulas."""
        return for_formulas(value, self.bucket.device, lambda tensor: tensor.detach().double().reshape(1, 1))

    def table(self, rows: Sequence[tuple[Family, list[Any]]]) -> Tensor:
        """The rows of these values, some of which are columns."""
        blocks = [self._block(one, values) for one, values in rows]
        return self._in_order([one for one, _ in rows], blocks).to(self.dtype)

    def _block(self, one: Family, values: list[Any]) -> Tensor:
        known = np.array([[0.0 if isinstance(x, Tensor) else x for x in values]], dtype=np.float64)
        one.constants.tell(known)
        rows, constants = len(one.members), one.constants.device_copy
        pieces = [
            (x if isinstance(x, Tensor) else constants[:, k : k + 1]).expand(rows, 1) for k, x in enumerate(values)
        ]
        return torch.cat(pieces, dim=1)

    def _in_order(self, families: Sequence[Family], blocks: Sequence[Tensor]) -> Tensor:
        """What belongs to the rows of each family, by row."""
        if len(blocks) == 1:
            return blocks[0]
        order = torch.cat([one.rows for one in families])
        joined = torch.cat(blocks)
        return torch.empty_like(joined).index_copy_(0, order, joined)

    def advance(self, news: Sequence[tuple[Family, list[Tensor]]], verdict: Tensor | None) -> None:
        """Put into the states what they hold after the step."""
        families = [one for one, _ in news]
        for key, before, parts in zip(self.keys, self.before, zip(*(values for _, values in news))):
            column = self._in_order(families, parts)
            if verdict is not None:
                column = torch.where(verdict[2] != 0, before, column)
            column = column.to(before.dtype).squeeze(1)
            for space, rows, indices in self.own:
                if self.in_order:
                    space.numbers[key].copy_(column)
                else:
                    space.numbers[key].index_copy_(0, indices, column.index_select(0, rows))


def _indices(rows: list[int], places: list[Any], device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows, and where among the numbers of their space those of each are."""
    return torch.tensor(rows, device=device), torch.tensor([places[k].index for k in rows], device=device)
