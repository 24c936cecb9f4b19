"""What the kernels are told of hyperparameters: rows of numbers, and which formulas read which columns."""

from __future__ import annotations

from collections.abc import Sequence
from operator import or_
from typing import Any, NamedTuple

import numpy as np
import torch
import triton.language as tl
from torch import Tensor

from . import refresh
from .buckets import Bucket
from .cohorts import Cohort, StepNumbers
from .identity import same
from .kernels import stages
from .options import Options
from .recorded import Recorded
from .rule import Stage, Update
from .upload import Upload

SHARED = 4
"""How many rows an evaluation for several must serve to be faster than one for each."""


class Chains(NamedTuple):
    """The kernel's view of a row."""

    used: tuple
    """Which stages of either chain some group uses: what tells one of these from another."""
    h: tuple
    on_grad: tuple
    on_update: tuple
    terms: tuple
    """The terms of which stages need means."""
    averages: tuple
    width: int
    means: tuple[int, ...]
    """The numbers of the means that its stages need, among all that the update chain may need."""
    means_at_most: int
    """How many it may need."""

    def columns(self, update: Update) -> list[Any]:
        """What stands in a row."""
        return [update.lr, *update.h, *update.averages, *self.arguments(update)]

    def arguments(self, update: Update) -> list[Any]:
        """The arguments of the stages that are used."""
        chains = zip((update.on_grad, update.on_update), self.used)
        return [x for chain, keep in chains for s, k in zip(chain, keep) if k for x in s.args]


class Rows:
    """The rows of one bucket: one per cohort and number of skipped steps that the host may not know of."""

    def __init__(self, bucket: Bucket, dtype: torch.dtype):
        self.bucket = bucket
        self.dtype = np.float64 if dtype == torch.float64 else np.float32
        self.draws = bucket.stored.draws
        self.upload = Upload(bucket.device)
        self.chains: dict[tuple, Chains] = {}
        self.stages: list[tuple[Stage, ...]] = []
        """The chains of the latest step's updates."""
        self.of_stages: tuple[Chains, list[list[float]]] | None = None
        """The kernel's view of these, and the arguments of each update."""
        self.options = Options([cohort.group for cohort in bucket.cohorts])
        self.graphs: list[tuple[Chains, int, Tensor]] = []
        """What CUDA graphs hold: which chains, how many variants, and the host's memory of the rows."""
        self.joins = len(bucket.cohorts) >= SHARED and not bucket.rule.scalars
        """Whether one evaluation may serve several cohorts."""

    @property
    def table(self) -> torch.Tensor:
        """The rows, on the device."""
        return self.upload.device_copy

    def write(self, update: StepNumbers, variants: int) -> Chains:
        """Tell the device the numbers of this step, for 0 .. ``variants`` - 1 skipped steps that the host has not heard
        of."""
        written = self._by_options(update, variants) if self.joins else None
        if written is None:
            written = self._by_cohort(update, variants)
        chains, rows = written
        self.upload.send(rows.astype(self.dtype))
        if self.upload.is_frozen:
            self.graphs.append((chains, variants, self.upload.frozen[-1][1]))
        return chains

    def of_graph(self, optimizer: Any, graph: tuple[Chains, int, Tensor]) -> list[tuple[Tensor, np.ndarray]]:
        """The host's memory of rows that a CUDA graph holds, and what belongs there now. RuntimeError where rows cannot
        say it."""
        chains, variants, memory = graph
        refresh.check_rule(optimizer, self.bucket.rule, [cohort.group for cohort in self.bucket.cohorts])
        found, rows = self._by_cohort(StepNumbers(optimizer), variants)
        refresh.check_stages(chains, found)
        return [(memory, rows.astype(self.dtype))]

    def _by_cohort(self, update: StepNumbers, variants: int) -> tuple[Chains, np.ndarray]:
        numbered = [(cohort, skipped) for cohort in self.bucket.cohorts for skipped in range(variants)]
        updates = [update(cohort, skipped) for cohort, skipped in numbered]
        chains, arguments = self._of_stages(updates)
        rows = np.array([[u.lr, *u.h, *u.averages, *args] for u, args in zip(updates, arguments)], dtype=np.float64)
        if self.draws:
            rows = np.column_stack([rows, [cohort.t + 1 - skipped for cohort, skipped in numbered]])
        return chains, rows

    def _by_options(self, update: StepNumbers, variants: int) -> tuple[Chains, np.ndarray] | None:
        """The same by one evaluation for all cohorts whose groups differ in nothing but the learning rate, as a column
        of numbers. None where there are too few such."""
        cohorts = self.bucket.cohorts
        kinds: dict[tuple[int, int], list[Cohort]] = {}
        for cohort, first in zip(cohorts, self.options.first_alike()):
            kinds.setdefault((first, cohort.t), []).append(cohort)
        if len(kinds) > len(cohorts) // SHARED:
            return None
        evaluated = []
        try:
            for (_, t), alike in kinds.items():
                rates = torch.tensor([float(c.group["lr"]) for c in alike], dtype=torch.float64, device="cpu")
                group = self.options.in_common(alike[0].group)
                group["lr"] = rates.unsqueeze(1)
                all_of_them = Cohort(0, group, t)
                evaluated += [(alike, skipped, update(all_of_them, skipped)) for skipped in range(variants)]
                if rates._version:
                    raise TypeError("a formula has written to the learning rates")
            chains = self.view([structure(u) for *_, u in evaluated])
        except Exception:  # a formula of a user's, written for Python's numbers, or for each group alone
            self.joins = False
            return None
        rows = np.empty((len(cohorts), variants, chains.width))
        for alike, skipped, u in evaluated:
            numbers = [cohort.number for cohort in alike]
            values = [*chains.columns(u), *([alike[0].t + 1 - skipped] if self.draws else ())]
            for column, value in enumerate(values):
                rows[numbers, skipped, column] = value.squeeze(1).numpy() if isinstance(value, Tensor) else value
        return chains, rows.reshape(-1, chains.width)

    def _of_stages(self, updates: Sequence[Update]) -> tuple[Chains, list[list[float]]]:
        """The chains that these updates need, and the arguments of each; most steps change neither."""
        stages = [chain for u in updates for chain in (u.on_grad, u.on_update)]
        if not same(stages, self.stages):
            chains = self.view(updates)
            self.stages, self.of_stages = stages, (chains, [chains.arguments(u) for u in updates])
        return self.of_stages

    def view(self, updates: Sequence[Update]) -> Chains:
        """The chains that these updates need; a stage that none of them uses is left out."""
        by_update = {(_used(u.on_grad), _used(u.on_update)) for u in updates}
        used = by_update.pop()
        for other in by_update:
            used = tuple(tuple(map(or_, *pair)) for pair in zip(used, other))
        if used not in self.chains:
            self.chains[used] = self._built(updates[0], used)
        return self.chains[used]

    def _built(self, update: Update, used: tuple) -> Chains:
        h, end = _columns(1, len(update.h))
        averages, end = _columns(end, len(update.averages))
        built, terms = [], []
        for chain, keep in zip((update.on_grad, update.on_update), used):
            picked = []
            for stage in (s for s, k in zip(chain, keep) if k):
                places, end = _columns(end, len(stage.args))
                found, _ = _columns(len(terms), len(stage.terms))
                terms += [stages.Term(getattr(stages, term), places) for term in stage.terms]
                picked.append(stages.Stage(getattr(stages, stage.name), places, found))
            built.append(tuple(picked))
        needed = [keep for stage, keep in zip(update.on_update, used[1]) for _ in stage.terms]
        numbers = tuple(number for number, keep in enumerate(needed) if keep)
        return Chains(used, h, *built, tuple(terms), averages, end + self.draws, numbers, len(needed))


def _used(chain: Sequence[Stage]) -> tuple[bool, ...]:
    """Which of these stages change anything."""
    return tuple([stage.args != stage.neutral for stage in chain])


def _columns(start: int, count: int) -> tuple[tuple, int]:
    """The next columns of a row, and where they end."""
    return tuple(tl.constexpr(c) for c in range(start, start + count)), start + count


def structure(update: Update) -> Update:
    """The update with NaN in place of numbers that only the device knows: they count as different from any other."""

    def plain(x: Any) -> Any:
        return float("nan") if isinstance(x, (Tensor, Recorded)) else x

    def stages(chain: tuple) -> tuple:
        return tuple(stage._replace(args=tuple(map(plain, stage.args))) for stage in chain)

    return update._replace(on_grad=stages(update.on_grad), on_update=stages(update.on_update))
