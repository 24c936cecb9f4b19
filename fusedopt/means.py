"""Means over each tensor: which stages of the update chain need one, how a kernel divides the work, and the fallback's
sums.

The terms of which they are means have their twins here, under the names that they have in ``kernels/stages.py``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .blocks import SECOND_CACHE
from .devices import sum_dtype
from .flat import memory_order
from .rule import Stage, Update

CHUNK = 16
"""Tiles per program: enough that a tensor's last program has little to add up, and few enough that one tensor of a
million elements occupies a GPU."""


def agreement(u, p, g, state):
    # The product of two small numbers could vanish. A comparison in place needs no slow conversion of bool.
    return u.sign().mul_(g).gt_(0)


def excess(u, p, g, state, eps_squared):
    return ahead_of(state[1], g, eps_squared)


def ahead_of(v, g, eps_squared, out=None):
    """g^2 / max(v, eps^2)"""
    x = torch.clamp(v, min=eps_squared, out=out)
    return torch.div(g, x, out=x).mul_(g)


def square_of_parameter(u, p, g, state, weight, adapts):
    return p.square()


def square_of_step(u, p, g, state, weight, adapts):
    return u.add(p, alpha=weight).square_()


terms = {term.__name__: term for term in (agreement, excess, square_of_parameter, square_of_step)}


def trust_ratio(of_parameter: Tensor, of_step: Tensor) -> Tensor:
    """|p| / |u| from the means of their squares; 1 where one is zero."""
    defined = (of_parameter != 0) & (of_step != 0)
    return torch.where(defined, of_parameter.sqrt() / of_step.sqrt(), 1.0)


def needed(optimizer: Any) -> int:
    """How many means the update chain of a group needs at most."""
    updates = map(optimizer.first_update, optimizer.param_groups)
    return max((sum(len(stage.terms) for stage in update.on_update) for update in updates), default=0)


def stages_of(update: Update) -> list[Stage]:
    """The stages that need means."""
    return [stage for stage in update.on_update if stage.terms]


class Chunks:
    """The table from which the kernel of the means knows which program adds which tiles, and the memory for its sums
    and means."""

    def __init__(self, tiles: Sequence[int], count: int, device: torch.device):
        """``tiles`` of each tensor, ``count`` means for each."""
        tiles = np.asarray(tiles)
        programs = -(-tiles // CHUNK)
        ends = np.cumsum(programs)
        tensor = np.repeat(np.arange(len(tiles)), programs)
        first_program = np.repeat(ends - programs, programs)
        first_tile = (np.arange(len(tensor)) - first_program) * CHUNK
        size = np.minimum(tiles[tensor] - first_tile, CHUNK)
        table = np.stack([tensor, first_tile, size, first_program, programs[tensor]], axis=1)
        self.programs = len(table)
        self.of_tensors = programs
        self.table = torch.from_numpy(table.astype(np.int32)).to(device)
        self.partials = torch.zeros(len(table), count, dtype=torch.float64, device=device)
        self.tickets = torch.zeros(len(tiles), dtype=torch.int32, device=device)
        self.means = torch.zeros(len(tiles), count, dtype=torch.float64, device=device)


def sums(blocks: Iterable[Sequence[Tensor]]) -> list[Tensor]:
    """The sum of each term over a tensor, given for each of its blocks one after the other."""
    # torch adds a block pairwise, which is right to the last bits of the dtype in a fraction of float64's time.
    return [sum(parts) for parts in zip(*([x.sum().to(sum_dtype(x.device)) for x in block] for block in blocks))]


def mean(x: Tensor, lengths: Sequence[int]) -> Tensor:
    """The mean over each parameter, of which those of ``lengths`` lie side by side in x: one number, or one for each
    element."""
    if len(lengths) > 1:
        return of_neighbours(x, lengths)
    return (x.sum().double() / x.numel()).to(x.dtype)


def mean_of_squares(x: Tensor, lengths: Sequence[int]) -> Tensor:
    if len(lengths) > 1:
        return mean(x.square(), lengths)
    # Over blocks a dot product is right to the last bits of the dtype, and five times faster.
    parts = memory_order(x).split(SECOND_CACHE[0])
    return (sum(part.dot(part).double() for part in parts) / x.numel()).to(x.dtype)


def of_neighbours(x: Tensor, sizes: Sequence[int]) -> Tensor:
    """For tensors of these sizes that lie side by side in x, at each element the mean over the one it belongs to."""
    lengths = torch.tensor(sizes, device=x.device)
    means = torch.segment_reduce(x.double(), "sum", lengths=lengths) / lengths
    return means.to(x.dtype).repeat_interleave(lengths)
