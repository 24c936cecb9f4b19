"""The fallback for parameters or states that are stored in other forms than plain numbers: tensor by tensor, in blocks
that stay in the cache, read as float32, updated, and stored again."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from . import torch_backend
from .clipping import Skips, Verdict
from .flat import is_dense, memory_order
from .forms import QUANTIZED, TWINS
from .philox import Draw
from .plan import Bucket, Cohort, Member
from .rule import Update
from .settings import Settings
from .storage import part_key
from .torch_backend import Run


class Executor(torch_backend.Executor):
    """Runs one bucket."""

    def __init__(self, bucket: Bucket, settings: Settings):
        self.twins = [TWINS[form.name] for _, form in bucket.stored.roles]
        # A parameter with gaps in memory is updated in a dense copy.
        self.copied = {m.param: _dense_like(m) for m in bucket.members if not is_dense(m.param)}
        super().__init__(bucket, settings)

    def _run(self, cohort: Cohort) -> Run:
        # Blocks of quantized values must not be cut.
        self.block = -(-self.block // QUANTIZED) * QUANTIZED
        strides = [m.place.strides for m in cohort.members]
        return Run(cohort, [], [], [], [], cohort.members, strides, [self._blocks(m) for m in cohort.members])

    def _blocks(self, member: Member) -> list[list[list[Tensor]]]:
        """For each block the parts of each role, the parameter's first."""
        tensors = {"": self.copied.get(member.param, member.param), **member.place.views}
        roles = []
        for role, form in self.bucket.stored.roles:
            parts = [memory_order(tensors[part_key(role, part)]) for part in form.parts]
            roles.append(list(zip(*(x.split(self.block // part.per) for x, part in zip(parts, form.parts)))))
        return list(zip(*roles))

    def step(self, update: Callable[[Cohort], Update], verdict: Verdict, skips: Skips) -> None:
        for param, copy in self.copied.items():
            copy.copy_(param)
        for run in self.runs:
            numbers = update(run.cohort)
            for member, blocks, g in zip(run.direct, run.blocks, run.grads):
                first = member.first_draw
                for parts, g_block in zip(blocks, memory_order(g).split(self.block)):
                    draw = Draw(self.settings.seed, run.cohort.t + 1, first)
                    self._update_stored(parts, g_block.to(self.compute_dtype), numbers, verdict.factor, draw)
                    first += self.block // 8
        for param, copy in self.copied.items():
            param.copy_(copy)
        # In-place writes that autograd does not see by itself.
        torch.autograd.graph.increment_version(self.in_place)

    def _update_stored(self, roles: list[list[Tensor]], g: Tensor, update: Update, factor: float, draw: Draw) -> None:
        p, *kept = (twin.load(parts, self.compute_dtype) for twin, parts in zip(self.twins, roles))
        self._update(p, g, kept, update, factor)
        for role, (twin, parts, x) in enumerate(zip(self.twins, roles, [p, *kept])):
            twin.store(parts, x, draw, role)


def _dense_like(member: Member) -> Tensor:
    p = member.param
    return torch.empty_strided(p.size(), member.place.strides, dtype=p.dtype, device=p.device)
