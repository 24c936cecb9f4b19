"""The fallback: the same chain -> rule -> chain in plain torch, as few and as large calls as possible.

Where torch has a fused CPU kernel for the rule, it is called on cached lists, once for all cohorts that share their
numbers; other rules run in blocks that stay in the cache (torch_blocks.py). Small tensors are gathered first: their
gradients with one call into a scratch buffer, and their parameters too, unless ``flatten`` made these contiguous for
good.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate, chain, groupby

import torch
from torch import Tensor

from . import units
from .blocks import WHOLE
from .buckets import Bucket, Member
from .clipping import Verdict
from .cohorts import Cohort, StepNumbers, alike
from .flat import contiguous, memory_order
from .gather import Gather, Picked, Staging, Ways, find_ways, neighbours
from .options import ASIDE, NOT_READ
from .places import Place
from .runs import Run
from .settings import Settings
from .skips import Skips
from .torch_blocks import Blocks, scale_of
from .torch_norm import norm
from .torch_stages import follow
from .torch_tally import Tally


class Executor:
    """Runs one bucket."""

    blocks_class = Blocks

    def __init__(self, bucket: Bucket, settings: Settings):
        self.bucket = bucket
        self.settings = settings
        rule = bucket.rule
        self.keys = (*rule.states, *bucket.averages)
        self.blocks = self.blocks_class(bucket, settings)
        self.compute_dtype = self.blocks.compute_dtype
        in_one_call = WHOLE if rule.takes_sizes else math.inf
        self.longest_row = in_one_call if bucket.fused else self.blocks.size
        """How many elements of parameters may lie side by side: sums over each take copies of all."""
        families = alike(bucket.cohorts, ASIDE if bucket.fused and rule.takes_rates else NOT_READ)
        ways_of = [[self._ways(some) for some in alike(family)] for family in families]
        ways = list(chain.from_iterable(ways_of))
        joined = [m for way in ways for m in way.joined]
        gathered = joined + [m for way in ways for m in way.listed]
        self.gather = Gather(gathered, "grad", bucket.grad_dtype, [m.position for m in gathered])
        staged = [m for m in joined if m.place.flattened is None]
        self.staging = Staging(staged, bucket.dtype)
        spaces = dict.fromkeys(m.place.space for m in gathered)
        self.scratch = [space.packed_copies("grad", bucket.grad_dtype) for space in spaces]
        for buffer in self.scratch:
            buffer.zero_()  # gradients of parameters that have none at this step
        in_copies = set(staged)
        self.in_place = [m.param for m in bucket.members if m not in in_copies]
        self.runs = [self._run(family[0], some) for family, some in zip(families, ways_of)]
        self.direct = [m for run in self.runs for m in run.direct]
        self.picked = Picked(self.direct)
        ends = list(accumulate((len(run.direct) for run in self.runs), initial=0))
        self.parts = list(map(slice, ends, ends[1:]))
        """Which of the direct members are those of each run."""
        permuted = [m for way in ways for m in way.listed + way.direct if not m.param.is_contiguous()]
        self.reordered = [
            (k, m.param.numel()) for k, m in enumerate(self.direct) if bucket.fused and not m.param.is_contiguous()
        ]
        """Where gradients are handed on as one dimension, as their parameters are, and how many elements these have."""
        self.begun = False
        """Whether this step's gradients were looked at, and clipped by units."""
        self.owes_zeros = False
        """Whether zeros shall take the gradients' place, and do not yet: kernels leave them, we do not."""
        self.pinned = joined + permuted if bucket.fused and not bucket.averages else bucket.members
        """Those whose memory must stay where it is: what is only ever taken from the parameter itself may be moved."""
        self.tally = None if settings.track is None else Tally(self.runs, self.blocks.size, bucket.device)
        self.blocks.tally = self.tally

    def _ways(self, cohorts: list[Cohort]) -> Ways:
        return find_ways(self.bucket, [m for cohort in cohorts for m in cohort.members], self.settings)

    def _run(self, cohort: Cohort, ways: list[Ways]) -> Run:
        """``ways`` are those of cohorts that share all their numbers."""
        lists = [[] for _ in self.keys]
        count = len(self.bucket.rule.states)
        rows = [row for way in ways for row in neighbours(way.joined, self.longest_row)]
        listed = [m for way in ways for m in way.listed]
        direct = [m for way in ways for m in way.direct]
        run = Run(cohort, [], lists[:count], lists[count:], [], direct)
        for row in rows:
            first, last, space = row[0], row[-1], row[0].place.space
            run.members += row
            part = slice(space.offsets[first.place.index], space.end(last.place.index))
            in_place = first.place.flattened is not None
            params = space.buffers["param"] if in_place else space.packed_copies("param", self.bucket.dtype)
            run.params.append(params[part])
            run.sizes.append([m.param.numel() for m in row])
            run.gathered.append(space.packed_copies("grad", self.bucket.grad_dtype)[part])
            for tensors, key in zip(lists, self.keys):
                tensors.append(space.buffers[key][part])
        run.gathered += [contiguous(m.place.packed_copy("grad", self.bucket.grad_dtype)) for m in listed]
        alone = listed + direct
        run.members += alone
        run.params += [contiguous(m.param) for m in alone]
        run.sizes += [[m.param.numel()] for m in alone]
        for tensors, key in zip(lists, self.keys):
            tensors += [self._memory(m.place, key) for m in alone]
        firsts = [*(row[0] for row in rows), *alone]
        for _, some in groupby(firsts, key=lambda m: m.cohort):
            some = list(some)
            run.groups.append((self.bucket.cohorts[some[0].cohort].group, len(some)))
        if not self.bucket.fused:
            for tensors in zip(run.params, *lists):
                flat = tuple(map(memory_order, tensors))
                long = len(flat[0]) > self.blocks.size
                run.blocks.append(list(zip(*(x.split(self.blocks.size) for x in flat))) if long else [flat])
        return run

    def _memory(self, place: Place, key: str) -> Tensor:
        """A state as the update takes it."""
        view = place.views[key]
        return view if self.bucket.fused and view.is_contiguous() else contiguous(place.memory(key))

    def take(self, grads: Sequence[Tensor | None], as_planned: bool, owes_zeros: bool) -> None:
        """Take this step's gradients, the direct ones in their parameters' layout. ``as_planned``: whether they are
        laid out as at the first step; ``owes_zeros``: whether zeros shall take their place."""
        self.owes_zeros, self.begun = owes_zeros, False
        if self.scratch:
            self.gather(grads)
        direct = self.picked(grads, as_planned)
        for k, size in self.reordered:
            direct[k] = direct[k].as_strided((size,), (1,))
        for run, part in zip(self.runs, map(direct.__getitem__, self.parts)):
            run.grads = run.gathered + part if run.gathered else part

    def release(self) -> None:
        """Forget the gradients: the next backward pass must not hold two sets of them."""
        for run in self.runs:
            run.grads = []

    def norm(self) -> float:
        """The norm of the gradients; not finite if and only if one of them is not."""
        tensors = [*self.scratch, *(g for run in self.runs for g in run.grads[len(run.gathered) :])]
        return norm(tensors, self.bucket.grad_dtype, self.compute_dtype)

    @property
    def ordered(self) -> Sequence[Member]:
        """The members of a bucket that is spread over ranks, in the order of means over them: none is gathered."""
        return self.direct

    def shares_of_means(self, update: StepNumbers, verdict: Verdict, skips: Skips) -> Tensor:
        """What this rank's parts add to the means over whole parameters: float64 [members, terms]."""
        self._begin(verdict)
        rows = []
        for run in self.runs:
            numbers = update(run.cohort)
            for m, blocks, g in zip(run.direct, run.blocks, run.grads):
                sums = self.blocks.sums(blocks, g, numbers, verdict.factor)
                rows.append(torch.stack(sums) / m.owner.numel() if sums else torch.zeros(0))
        return torch.stack(rows)

    def step(self, update: StepNumbers, verdict: Verdict, skips: Skips, found: Tensor | None = None) -> None:
        """Update parameters and states; where the step is skipped, only take the sums of squares. ``found`` are the
        means, where ranks have joined theirs."""
        self.staging.fetch()
        self._begin(verdict)
        if verdict.skip:
            self.tally.look(self.blocks.load)
            return
        # In-place writes that autograd does not see by itself; noted while what was just checked lies in the cache.
        torch.autograd.graph.increment_version(self.in_place)
        if self.bucket.fused:
            self._step_fused(update, verdict.factor)
        else:
            joined = None if found is None else iter(found.to(self.compute_dtype))
            for run in self.runs:
                self.blocks.update(run, update(run.cohort), verdict.factor, joined)
        self.staging.put_back()

    def _begin(self, verdict: Verdict) -> None:
        if self.begun:
            return
        self.begun = True
        if self.tally is not None:
            self.tally.begin(verdict.loss_scale)
        if self.settings.adaptive_grad_clip is not None and not verdict.skip:
            units.clip_runs(self.runs, self.settings.adaptive_grad_clip, verdict.factor, self.compute_dtype)

    def _step_fused(self, update: StepNumbers, factor: float) -> None:
        clips = self.settings.max_grad_value is not None
        # The kernels take the factor in float32 only.
        if factor != 1 and (clips or self.bucket.dtype == torch.float64):
            torch._foreach_mul_([g for run in self.runs for g in run.grads], factor)
            factor = 1.0
        if clips:
            for g in (g for run in self.runs for g in run.grads):
                g.clamp_(*self.settings.value_limits)
        scale = scale_of(factor)
        if scale is not None:
            # Where they write it back, autograd does not see it.
            torch.autograd.graph.increment_version([g for run in self.runs for g in run.grads[len(run.gathered) :]])
        fused = self.bucket.rule.fused
        for run in self.runs:
            before = None if self.tally is None else self.tally.copies(run)
            cohort = run.cohort
            more = run.arguments_of(self.bucket.rule)
            fused(run.params, run.grads, run.states, cohort.t + 1, cohort.group, scale, *more, *cohort.scalars)
            if before is not None:
                self.tally.compare(before, run)
            # While the parameters lie in the cache.
            if run.averages:
                for averages, weight in zip(run.averages, update(cohort).averages):
                    follow(averages, run.params, weight)
