"""The fallback's update of what torch has no fused kernel for: block by block, each as long as the cache holds it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import repeat

import torch
from torch import Tensor

from . import means
from .blocks import for_threads
from .buckets import Bucket
from .flat import memory_order
from .forms import wide
from .rule import Stage, Update
from .runs import Run
from .settings import Settings
from .torch_stages import follow, through
from .torch_tally import Tally
from .widened import COPIED, fused_step, widened

BLOCK = 1 << 17
"""Elements per block."""


class Blocks:
    """Updates the blocks of one bucket."""

    def __init__(self, bucket: Bucket, settings: Settings):
        self.rule = bucket.rule
        self.compute_dtype = wide(bucket.dtype)
        self.fused_step = fused_step(bucket, settings)
        """What torch's fused kernels make of a block of 16-bit tensors."""
        dtypes = {form.parts[0].dtype for _, form in bucket.stored.roles}
        self.computes_in_place = dtypes | {bucket.dtype} == {self.compute_dtype}
        usual = BLOCK if self.computes_in_place else COPIED
        largest = max(m.param.numel() for m in bucket.members) or 1
        self.size = for_threads(usual) if bucket.device.type == "cpu" else largest
        self.tally: Tally | None = None
        """What takes sums of the blocks, where ``track`` is set."""

    def update(self, run: Run, update: Update, factor: float, joined: Iterator[Tensor] | None = None) -> None:
        """Update a run block by block; ``joined`` are the means, where ranks have joined theirs."""
        terms = means.stages_of(update)
        scale = None if self.fused_step is None else scale_of(factor)
        for blocks, sizes, g in zip(run.blocks, run.sizes, run.grads):
            flat = memory_order(g)
            parts = list(zip(blocks, flat.split(self.size) if len(blocks) > 1 else (flat,)))
            if self.fused_step is not None:
                for tensors, g_block in parts:
                    self.fused_step(tensors, g_block, run.cohort, scale, update)
                continue
            if not terms:
                # A direction is dropped before the next one is made, which then takes its memory, still in the cache.
                for tensors, g_block in parts:
                    self._follow(tensors, self._direction(self.load(tensors), g_block, update, factor), (), update)
                continue
            directions = (self._direction(self.load(tensors), g, update, factor) for tensors, g in parts)
            if joined is not None:
                found = repeat(next(joined).unbind())
            elif len(parts) == 1 or (self.computes_in_place and g.dtype == self.compute_dtype):
                directions = list(directions)
                found = self._means(terms, directions, sizes)
            else:
                # All directions, before the first is followed. Copies in a wider dtype serve one block at a time, so
                # here they are computed twice.
                found = self._means(terms, self._glimpses(parts, update, factor), sizes)
            for tensors, direction, block_means in zip(blocks, directions, found):
                self._follow(tensors, direction, block_means, update)

    def sums(self, blocks: Sequence[tuple], g: Tensor, update: Update, factor: float) -> list[Tensor]:
        """The sums over one parameter of the terms whose means its stages need."""
        parts = zip(blocks, memory_order(g).split(self.size))
        return means.sums(self._terms(means.stages_of(update), self._glimpses(parts, update, factor)))

    def load(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """A block's parameter, states and averages in the dtype of arithmetic."""
        return tensors if self.computes_in_place else widened(tensors, self.compute_dtype)

    def store(self, tensors: Sequence[Tensor], values: list[Tensor]) -> None:
        if not self.computes_in_place:
            torch._foreach_copy_(tensors, values)

    def _direction(self, loaded: Sequence[Tensor], g: Tensor, update: Update, factor: float) -> tuple:
        """What the rule makes of one block: (u, g, p, states and averages), in the dtype of arithmetic."""
        p, *kept = loaded
        if g.dtype != self.compute_dtype:
            (g,) = widened([g], self.compute_dtype, "gradient")
        g = through(update.on_grad, g if factor == 1 else g * factor, p)
        return self.rule.twin(g, kept[: len(self.rule.states)], update.h), g, p, kept

    def _glimpses(self, parts: Iterable[tuple], update: Update, factor: float) -> Iterator[tuple]:
        """The directions, one after the other, with the states left as they are."""
        for tensors, g in parts:
            # What has the dtype of arithmetic already was not copied by loading it.
            p, *kept = self.load(tensors)
            yield self._direction((p, *(x.clone() for x in kept)), g, update, factor)

    def _terms(self, stages: Sequence[Stage], directions: Iterable[tuple]) -> Iterator[list[Tensor]]:
        """For each block the terms of which these stages need means."""
        for u, g, p, kept in directions:
            yield [means.terms[term](u, p, g, kept, *s.args) for s in stages for term in s.terms]

    def _means(self, stages: Sequence[Stage], directions: Iterable[tuple], sizes: Sequence[int]) -> Iterable[list]:
        """For each block the means that these stages need."""
        blocks = self._terms(stages, directions)
        if len(sizes) > 1:
            return [[means.of_neighbours(x, sizes) for x in block] for block in blocks]  # there is but one
        return repeat([(total / sizes[0]).to(self.compute_dtype) for total in means.sums(blocks)])

    def _follow(self, tensors: Sequence[Tensor], direction: tuple, found: Sequence[Tensor], update: Update) -> None:
        u, g, p, kept = direction
        before = None if self.tally is None else p.clone()
        *chain, last = update.on_update
        decays = last.name == "decay" and last.args != last.neutral
        u = through(chain if decays else update.on_update, u, p, g, found)
        if decays:
            # (1 - lr weight) p - lr u, as torch does: it takes no memory, unlike p - lr (u + weight p).
            p.mul_(1 - update.lr * last.args[0])
        p.sub_(u, alpha=update.lr)
        if self.tally is not None:
            self.tally.add(before, p)
        for average, weight in zip(kept[len(self.rule.states) :], update.averages):
            follow([average], [p], weight)
        self.store(tensors, [p, *kept])


def scale_of(factor: float) -> Tensor | None:
    """What torch's fused kernels divide gradients by, to multiply them by ``factor``."""
    return None if factor == 1 else torch.tensor(1 / factor if factor else math.inf, dtype=torch.float32, device="cpu")
