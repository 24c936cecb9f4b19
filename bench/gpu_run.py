"""What the parts of gpu.py share: where rows go, on what they run, and how a dry run makes it small."""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from device import Cpu, device, surroundings
from history import Row, append
from problem import Case
from shapes import MODELS, tiny
from step import line
from step import run as run_cases

ROOT = pathlib.Path(__file__).resolve().parent.parent


class Run:
    """One run of gpu.py. Nothing here touches a GPU before a part does, but to see whether there is one."""

    def __init__(self, out: pathlib.Path, dry: bool):
        self.out, self.dry = out, dry
        self.history = out / "history.csv"
        self.backend = "triton" if dry else None
        self.where = "cpu" if dry and not torch.cuda.is_available() else "cuda"
        self.end = 0.0
        """When the part that runs is ended, as ``time.monotonic()`` tells it in every process."""
        self.models = {name: tiny(groups) for name, groups in MODELS.items()} if dry else MODELS

    @functools.cached_property
    def on(self) -> Cpu:
        """The GPU, or in a dry run without one the CPU."""
        torch.set_num_threads(1)
        on = device(self.where)
        if self.dry:
            on.copy_bytes = 2**20
        return on

    def few(self, things: Sequence[Any], count: int = 1) -> list[Any]:
        """All of them; in a dry run only the first."""
        return list(things)[: count if self.dry else None]

    def measure(self, cases: Iterable[Case], names: Sequence[str], seconds: float = 0.4) -> list[Row]:
        return run_cases(
            cases, names, self.on, 0.0 if self.dry else seconds, out=self.history,
            models=self.models, backend=self.backend,
        )  # fmt: skip

    def write(self, *rows: Row) -> None:
        print(*map(line, rows), sep="\n", flush=True)
        append(rows, self.history)

    def result(self, part: str, name: str, status: str, note: str) -> None:
        """A row of a check: ``status`` "ok", "failed" or "skipped", and what was seen."""
        # Asking for the GPU's name would start it, which the process that only starts others must not.
        where = surroundings(self.where)
        self.write(Row(**where, part=part, implementation=name, status=status, note=note))
