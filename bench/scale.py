"""How the host's part of a step grows with the number of tensors.

    python bench/scale.py [--counts 1000 10000 100000] [--repeats 3] [--save] [--note TEXT]

AdamW with clipping, over tiny tensors, so that nothing but the host's work counts. First the plan: what planning takes
at the first step; what it takes later to plan from the beginning, for three quarters of the parameters; and what
checking the plan takes at every other step. Then whole steps: the first; one with the gradients of the step before;
with all gradients elsewhere; with another quarter of them missing than at the step before.

"torch" is the fallback on a CPU, which does its work (beside it, in turns, torch's fused step and ``clip_grad_norm_``).
"triton" is the kernels' side, for CPU tensors and a GPU on which nothing runs, with the bytes that a step sends there,
its tables at the first step included. Seconds of the process, medians. ``--save`` appends rows to ``history.csv``. On
many ranks: ``bench/ranks.py``.
"""

from __future__ import annotations

import argparse
import gc
import pathlib
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import history
import host
import torch
from device import surroundings
from sent import Sent, counted
from torch import Tensor
from triton.runtime import driver

import fusedopt
from fusedopt import backends
from fusedopt.__main__ import amount

SIZE = 3
PARTS = 4
"""One of so many parameters has no gradient."""

FIRST, SAME, MOVED, OTHER = KINDS = "first step", "same gradients", "moved gradients", "other gradients"
"""What distinguishes a whole step's gradients from those of the step before."""

TURNS = 5
"""Steps of each kind that are timed, after one that is not."""


class Times(NamedTuple):
    """Of planning, in seconds."""

    first: float
    """For a first step."""
    anew: float
    """For a later step, from the beginning."""
    check: float
    """To look whether the plan serves a step like the last."""


class Step(NamedTuple):
    """A whole step."""

    seconds: float
    sent: Sent
    rival: float | None
    """Seconds of torch's fused step in its place, where that was measured."""


def seconds(action: Callable[[], object]) -> float:
    begin = time.process_time()
    action()
    return time.process_time() - begin


def tensors(count: int) -> tuple[list[torch.nn.Parameter], list[list[Tensor]]]:
    """Parameters, and two sets of gradients for them."""
    params = [torch.nn.Parameter(torch.zeros(SIZE)) for _ in range(count)]
    return params, [[torch.ones(SIZE) for _ in params] for _ in range(2)]


def without_a_part(grads: list[Tensor], turn: int) -> list[Tensor | None]:
    return [None if k % PARTS == turn % PARTS else g for k, g in enumerate(grads)]


@torch.no_grad()
def planning(count: int, backend: str) -> Times:
    params, (grads, _) = tensors(count)
    optimizer = fusedopt.AdamW(params, max_grad_norm=1.0, backend=backend)
    engine = optimizer._engine

    def plan(there: list[Tensor | None]) -> float:
        for p, g in zip(params, there):
            p.grad = g
        return seconds(lambda: engine._build(optimizer, there))

    gc.collect()
    first = plan(grads)

    def known() -> bool:
        return engine.plan.knows(optimizer) and engine.plan.holds(grads)

    check = statistics.median(seconds(known) for _ in range(7))
    assert known()
    anew = statistics.median(plan(without_a_part(grads, turn)) for turn in range(PARTS))
    return Times(first, anew, check)


class Torchs:
    """What torch does in place of our step."""

    def __init__(self, params: list[torch.nn.Parameter]):
        self.params = params
        self.optimizer = torch.optim.AdamW(params, fused=True)

    def step(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.params, 1.0, foreach=True)
        self.optimizer.step()


def steps(count: int, backend: str) -> dict[str, Step]:
    params, grads = tensors(count)
    optimizer = fusedopt.AdamW(params, max_grad_norm=1.0, backend=backend)
    rival = Torchs([torch.nn.Parameter(torch.zeros(SIZE)) for _ in params]) if backend == "torch" else None

    def taken(there: list[Tensor | None]) -> Step:
        for p, g in zip(params, there):
            p.grad = g
        with counted(optimizer) as sent:
            ours = seconds(optimizer.step)
        for p, g in zip(rival.params, there) if rival is not None else ():
            p.grad = g
        return Step(ours, sent, None if rival is None else seconds(rival.step))

    gradients = {
        SAME: lambda turn: grads[0],
        MOVED: lambda turn: grads[turn % 2],
        OTHER: lambda turn: without_a_part(grads[0], turn),
    }
    gc.collect()
    found = {FIRST: taken(grads[0])}
    for kind, make in gradients.items():
        _, *measured = [taken(make(turn)) for turn in range(1 + TURNS)]
        found[kind] = typical(measured)
    return found


def typical(measured: list[Step]) -> Step:
    """Median times. What is sent differs by rows of hyperparameters where other gradients are there: the most."""
    sent = Sent(*(max(getattr(step.sent, name) for step in measured) for name in ("bytes", "launches")))
    rivals = [step.rival for step in measured if step.rival is not None]
    median = statistics.median(step.seconds for step in measured)
    return Step(median, sent, statistics.median(rivals) if rivals else None)


def rows(count: int, backend: str, times: Times, whole: dict[str, Step], repeats: int, note: str) -> list[history.Row]:
    where = surroundings("cpu")
    what = {
        "tensors": count, "elements": SIZE * count, "optimizer": "AdamW", "dtype": "float32", "clip": True,
        "amp": False, "implementation": backend, "rounds": repeats, "model": f"{count} tensors", "note": note,
    }  # fmt: skip
    found = [
        history.Row(
            **where, **what, part="plan", first_ms=round(times.first * 1e3, 1), host_us=round(times.check * 1e6, 1)
        ),
        history.Row(**where, **what, part="new plan", host_us=round(times.anew * 1e6, 1)),
    ]
    for kind, step in whole.items():
        row = history.Row(**where, **what, part=kind, host_us=round(step.seconds * 1e6, 1))
        if backend == "triton":
            row.bytes, row.launches = step.sent.bytes, step.sent.launches
        if step.rival is not None:
            row.rival, row.rival_us = "fused", round(step.rival * 1e6, 1)
            row.ratio = round(step.seconds / step.rival, 3)
        found.append(row)
    return found


def line(backend: str, count: int, times: Times, whole: dict[str, Step]) -> str:
    cells = [f"{x * 1e3:10.2f} ms" for x in times]
    for step in whole.values():
        beside = f"{step.sent.bytes:10} B" if step.rival is None else f"{step.rival * 1e3:9.2f} ms"
        cells.append(f"{step.seconds * 1e3:13.2f} ms {beside}")
    return f"{backend:7} {count:9}{''.join(cells)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", nargs="+", type=amount, default=[1_000, 10_000, 100_000], help="numbers of tensors")
    parser.add_argument("--repeats", type=amount, default=3, help="optimizers of each kind (default: %(default)s)")
    parser.add_argument("--note", default="", help="what the rows shall say of the machine's state")
    parser.add_argument("--save", action="store_true", help="append the rows to --out")
    parser.add_argument("--out", type=pathlib.Path, default=history.HISTORY, help="default: bench/history.csv")
    options = parser.parse_args()
    torch.set_num_threads(1)
    driver.set_active(host.NoGPU())
    backends._device_problem = lambda device, requested: None  # CPU tensors are taken for those of the GPU
    steps(2 * PARTS, "triton")  # compiles the kernels
    heads = "".join(f"{kind:>15} (torch, sent)" for kind in KINDS)
    print(f"backend   tensors   first plan     new plan      checked{heads}")
    for backend in ("torch", "triton"):
        for count in options.counts:
            plans = [planning(count, backend) for _ in range(options.repeats)]
            times = Times(*map(statistics.median, zip(*plans)))
            every = [steps(count, backend) for _ in range(options.repeats)]
            whole = {kind: typical([found[kind] for found in every]) for kind in KINDS}
            print(line(backend, count, times, whole), flush=True)
            if options.save:
                history.append(rows(count, backend, times, whole, options.repeats, options.note), options.out)


if __name__ == "__main__":
    main()
