"""What the kernels are told of hyperparameters: rows of numbers, and which formulas read which columns."""

from __future__ import annotations

from collections.abc import Sequence
from operator import or_
from typing import Any, NamedTuple

import numpy as np
import torch
import triton.language as tl

from .buckets import Bucket
from .kernels import stages
from .rule import Stage, Update
from .upload import Upload


class Chains(NamedTuple):
    """The kernel's view of a row."""

    used: tuple
    """Which stages of either chain some group uses: what tells one of these from another."""
    h: tuple
    on_grad: tuple
    on_update: tuple
    terms: tuple
    """Those of which stages need means."""
    averages: tuple
    width: int
    means: tuple[int, ...]
    """Which of the means that the update chain may need its stages do, by number."""
    means_at_most: int
    """How many it may need."""

    def columns(self, update: Update) -> list[Any]:
        """What stands in a row."""
        args = [x for chain, keep in self._stages(update) for s, k in zip(chain, keep) if k for x in s.args]
        return [update.lr, *update.h, *update.averages, *args]

    def _stages(self, update: Update) -> Any:
        return zip((update.on_grad, update.on_update), self.used)


class Rows:
    """The rows of one bucket: one per cohort and number of skipped steps that the host may not know of."""

    def __init__(self, bucket: Bucket, dtype: torch.dtype):
        self.bucket = bucket
        self.dtype = np.float64 if dtype == torch.float64 else np.float32
        self.draws = bucket.stored.draws
        self.upload = Upload(bucket.device)
        self.chains: dict[tuple, Chains] = {}

    @property
    def table(self) -> torch.Tensor:
        """The rows, on the device."""
        return self.upload.device_copy

    def write(self, updates: Sequence[Update], steps: Sequence[int]) -> Chains:
        """Tell the device the numbers of these updates; ``steps`` are the steps that they make."""
        chains = self.view(updates)
        rows = np.array([chains.columns(u) for u in updates], dtype=np.float64)
        if self.draws:
            rows = np.column_stack([rows, steps])
        self.upload.send(rows.astype(self.dtype))
        return chains

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
                mean = tl.constexpr(-1)
                if stage.term is not None:
                    mean = tl.constexpr(len(terms))
                    terms.append(stages.Term(getattr(stages, stage.term), places))
                picked.append(stages.Stage(getattr(stages, stage.name), places, mean))
            built.append(tuple(picked))
        needed = [keep for stage, keep in zip(update.on_update, used[1]) if stage.term is not None]
        numbers = tuple(number for number, keep in enumerate(needed) if keep)
        return Chains(used, h, *built, tuple(terms), averages, end + self.draws, numbers, len(needed))


def _used(chain: Sequence[Stage]) -> tuple[bool, ...]:
    """Which of these stages change anything."""
    return tuple([stage.args != stage.neutral for stage in chain])


def _columns(start: int, count: int) -> tuple[tuple, int]:
    """The next columns of a row, and where they end."""
    return tuple(tl.constexpr(c) for c in range(start, start + count)), start + count
