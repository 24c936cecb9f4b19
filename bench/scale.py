"""How the host's part of a step grows with the number of tensors.

    python bench/scale.py [--counts 1000 10000 100000] [--repeats 3] [--save] [--note TEXT]

Tiny tensors, so that nothing but the plan counts: what planning takes at the first step; at a step where another
quarter of the parameters has no gradient than at the step before; and what checking the plan takes at every other step.
"torch" is the fallback on a CPU; "triton" the kernels' tables, for CPU tensors and a GPU on which nothing runs. Seconds
of the process, medians. ``--save`` appends rows to ``history.csv``.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable

import history
import host
import torch
from device import surroundings
from triton.runtime import driver

import fusedopt
from fusedopt import backends

SIZE = 3
PARTS = 4
"""One of so many parameters has no gradient."""


def seconds(action: Callable[[], object]) -> float:
    begin = time.process_time()
    action()
    return time.process_time() - begin


@torch.no_grad()
def measured(count: int, backend: str) -> tuple[float, float, float]:
    """Seconds to plan a first step of ``count`` tensors, to plan one with other gradients than the last, and to check
    the plan at a step like the last."""
    params = [torch.nn.Parameter(torch.zeros(SIZE)) for _ in range(count)]
    grads = [torch.ones(SIZE) for _ in params]
    optimizer = fusedopt.AdamW(params, max_grad_norm=1.0, backend=backend)
    engine = optimizer._engine

    def plan(absent: int | None) -> float:
        there = [None if k % PARTS == absent else g for k, g in enumerate(grads)]
        for p, g in zip(params, there):
            p.grad = g
        return seconds(lambda: engine._build(optimizer, there))

    gc.collect()
    first = plan(None)
    check = statistics.median(seconds(lambda: engine.plan.holds(optimizer, params, grads)) for _ in range(7))
    assert engine.plan.holds(optimizer, params, grads)
    changed = statistics.median(map(plan, range(PARTS)))
    return first, changed, check


def rows(count: int, backend: str, times: tuple[float, float, float], repeats: int, note: str) -> list[history.Row]:
    first, changed, check = times
    what = {
        "tensors": count, "elements": SIZE * count, "optimizer": "AdamW", "dtype": "float32", "clip": True,
        "amp": False, "implementation": backend, "rounds": repeats, "model": f"{count} tensors", "note": note,
    }  # fmt: skip
    surrounding = surroundings("cpu")
    return [
        history.Row(**surrounding, part="plan", first_ms=round(first * 1e3, 1), host_us=round(check * 1e6, 1), **what),
        history.Row(**surrounding, part="new plan", host_us=round(changed * 1e6, 1), **what),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", nargs="+", type=int, default=[1_000, 10_000, 100_000], help="numbers of tensors")
    parser.add_argument("--repeats", type=int, default=3, help="optimizers of each kind (default: %(default)s)")
    parser.add_argument("--note", default="", help="what the rows shall say of the machine's state")
    parser.add_argument("--save", action="store_true", help="append rows to history.csv")
    options = parser.parse_args()
    torch.set_num_threads(1)
    driver.set_active(host.NoGPU())
    backends._device_problem = lambda device, requested: None  # CPU tensors are taken for those of the GPU
    print("backend   tensors   first plan     new plan      checked")
    for backend in ("torch", "triton"):
        for count in options.counts:
            found = [measured(count, backend) for _ in range(options.repeats)]
            times = tuple(map(statistics.median, zip(*found)))
            print(f"{backend:7} {count:9}" + "".join(f"{x * 1e3:10.2f} ms" for x in times), flush=True)
            if options.save:
                history.append(rows(count, backend, times, options.repeats, options.note))


if __name__ == "__main__":
    main()
