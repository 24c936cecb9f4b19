"""The fallback for parameters or states that are stored in other forms than plain numbers: tensor by tensor, in blocks
that stay in the cache, read as float32, updated, and stored again."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

from . import torch_backend
from .buckets import Bucket, Member
from .clipping import Verdict
from .cohorts import Cohort, StepNumbers
from .flat import is_dense, memory_order
from .forms import QUANTIZED, TWINS
from .gather import Ways
from .philox import Draw
from .rule import Update
from .runs import Run
from .settings import Settings
from .skips import Skips
from .storage import part_key
from .torch_blocks import Blocks


class Block(NamedTuple):
    """Some of one tensor's elements."""

    first_draw: int
    roles: tuple[tuple[Tensor, ...], ...]
    """The parts of the parameter, of the states and of the averages."""


class StoredBlocks(Blocks):
    """Updates the blocks of one bucket, whose tensors are stored in other forms."""

    def __init__(self, bucket: Bucket, settings: Settings):
        super().__init__(bucket, settings)
        self.twins = [TWINS[form.name] for _, form in bucket.stored.roles]
        # Quantized elements that share a scale stay together.
        self.size = -(-self.size // QUANTIZED) * QUANTIZED
        self.settings = settings
        self.t = 0

    def update(self, run: Run, update: Update, factor: float, joined: Iterator[Tensor] | None = None) -> None:
        self.t = run.cohort.t + 1
        super().update(run, update, factor, joined)

    def load(self, block: Block) -> list[Tensor]:
        return [twin.load(parts, self.compute_dtype) for twin, parts in zip(self.twins, block.roles)]

    def store(self, block: Block, values: list[Tensor]) -> None:
        draw = Draw(self.settings.seed, self.t, block.first_draw)
        for role, (twin, parts, x) in enumerate(zip(self.twins, block.roles, values)):
            twin.store(parts, x, draw, role)


class Executor(torch_backend.Executor):
    """Runs one bucket."""

    blocks_class = StoredBlocks

    def __init__(self, bucket: Bucket, settings: Settings):
        # A parameter with gaps in memory is updated in a dense copy.
        self.copied = {m.param: m.place.without_gaps() for m in bucket.members if not is_dense(m.param)}
        super().__init__(bucket, settings)

    def _run(self, cohort: Cohort, ways: list[Ways]) -> Run:
        members = [m for way in ways for some in way for m in some]
        blocks = [self._blocks(m) for m in members]
        sizes = [[m.param.numel()] for m in members]
        return Run(cohort, [], [], [], [], members, blocks, members, sizes)

    def _blocks(self, member: Member) -> list[Block]:
        place = member.place
        tensors = {"": self.copied.get(member.param, member.param), **{key: place.memory(key) for key in place.views}}
        roles, size = [], self.blocks.size
        for role, form in self.bucket.stored.roles:
            parts = [memory_order(tensors[part_key(role, part)]) for part in form.parts]
            roles.append(list(zip(*(x.split(size // part.per) for x, part in zip(parts, form.parts)))))
        return [Block(member.first_draw + k * size // 8, parts) for k, parts in enumerate(zip(*roles))]

    def step(self, update: StepNumbers, verdict: Verdict, skips: Skips, found: Tensor | None = None) -> None:
        for param, copy in self.copied.items():
            copy.copy_(param)
        super().step(update, verdict, skips, found)
        for param, copy in self.copied.items():
            param.copy_(copy)
