"""Where the kernels leave the sums of squares that ``optimizer.metrics`` is made of."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from .kernels import tally
from .means import Chunks
from .triton_tables import Tables


class PartialSums:
    """Memory for the sums of squares over the parts that some tensors are cut into."""

    def __init__(self, parts: Sequence[int], device: torch.device):
        """``parts``: how many each tensor has."""
        self.lengths = torch.as_tensor(parts).to(device)
        self.sums = torch.zeros(int(sum(parts)), tally.SUMS.value, dtype=torch.float64, device=device)

    def of_tensors(self) -> Tensor:
        """float64 [tensors, SUMS]. Nobody waits for a GPU."""
        # unsafe: to check the lengths torch would wait.
        columns = self.sums.t().contiguous()
        found = [torch.segment_reduce(x, "sum", lengths=self.lengths, unsafe=True) for x in columns]
        return torch.stack(found, dim=1)


class Tally:
    """The sums of one bucket; its places are made when a step first needs them."""

    def __init__(self, positions: Sequence[int], tables: Tables, device: torch.device):
        self.positions = positions
        self.tables = tables
        self.device = device
        self.latest: PartialSums | None = None

    @cached_property
    def chunks(self) -> Chunks:
        """Which tiles a program of the tracked update takes."""
        return Chunks(self.tables.tiles.of_tensors, 0, self.device)

    @cached_property
    def of_chunks(self) -> PartialSums:
        return PartialSums(self.chunks.of_tensors, self.device)

    @cached_property
    def of_norm_tiles(self) -> PartialSums:
        """For the cooperative kernel."""
        return PartialSums(self.tables.norm_tiles.of_tensors, self.device)

    def sums(self) -> Tensor:
        if self.latest is None:  # all tensors are empty, and nothing was launched
            return torch.zeros(len(self.positions), tally.SUMS.value, dtype=torch.float64, device=self.device)
        return self.latest.of_tensors()
