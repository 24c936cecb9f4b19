"""The sums of squares that ``optimizer.metrics`` is made of, in plain torch: block by block, as the update goes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .devices import sum_dtype
from .flat import memory_order
from .metrics import SUMS


class Tally:
    """The sums of one bucket. A row belongs to a parameter; blocks come in the order of the runs."""

    def __init__(self, runs: Sequence[Any], block: int, device: torch.device):
        self.runs = runs
        self.block = block
        self.positions = [m.position for run in runs for m in run.members]
        self.squares = torch.zeros(len(self.positions), SUMS, dtype=sum_dtype(device), device=device)
        self.cuts: list[tuple[int, Tensor]] = []
        """For each block its first row, and how many elements belong to that row and to each after it."""
        row = 0
        for sizes in (sizes for run in runs for sizes in run.sizes):
            for first, lengths in _cuts(sizes, block):
                self.cuts.append((row + first, torch.from_numpy(lengths).to(device)))
            row += len(sizes)
        self.place = 0

    def sums(self) -> Tensor:
        return self.squares

    def begin(self, loss_scale: Tensor | None) -> None:
        """Take this step's gradients."""
        self.squares.zero_()
        for cut, block in zip(self.cuts, self._split(g for run in self.runs for g in run.grads), strict=True):
            self._add(0, cut, block)
        if loss_scale is not None:
            self.squares[:, 0] /= loss_scale.to(self.squares).square()
        self.place = 0

    def add(self, before: Tensor | None, after: Tensor) -> None:
        """The next block of a parameter, before and after its update; without one, nothing before."""
        cut = self.cuts[self.place]
        self.place += 1
        if before is not None:
            self._add(1, cut, after - before)
        self._add(2, cut, after)

    def copies(self, run: Any) -> list[Tensor]:
        """A run's parameters before its update, where that does not go block by block."""
        return list(map(torch.clone, self._split(run.params)))

    def compare(self, before: list[Tensor], run: Any) -> None:
        for old, new in zip(before, self._split(run.params)):
            self.add(old, new)

    def look(self, load: Callable[[Any], Sequence[Tensor]]) -> None:
        """The parameters of a skipped step; ``load`` reads a block."""
        for run in self.runs:
            blocks = (load(tensors)[0] for parts in run.blocks for tensors in parts)
            for block in blocks if run.blocks else self._split(run.params):
                self.add(None, block)

    def _split(self, tensors: Iterable[Tensor]) -> Iterator[Tensor]:
        return (block for x in tensors for block in memory_order(x).split(self.block))

    def _add(self, column: int, cut: tuple[int, Tensor], x: Tensor) -> None:
        first, lengths = cut
        x = x.to(self.squares.dtype)
        if len(lengths) == 1:
            self.squares[first, column] += torch.dot(x, x)
        else:
            found = torch.segment_reduce(x.square(), "sum", lengths=lengths, unsafe=True)
            self.squares[first : first + len(lengths), column] += found


def _cuts(sizes: Sequence[int], block: int) -> Iterator[tuple[int, np.ndarray]]:
    """For neighbours of these sizes, cut into blocks: the first that a block has a part of, and its parts."""
    ends = np.cumsum(sizes)
    starts = ends - sizes
    # No elements are one empty block.
    for start in range(0, max(ends[-1], 1), block):
        end = min(start + block, ends[-1])
        first = min(np.searchsorted(ends, start, "right"), len(sizes) - 1)
        last = max(np.searchsorted(starts, end, "left"), first + 1)
        yield int(first), np.minimum(ends[first:last], end) - np.maximum(starts[first:last], start)
