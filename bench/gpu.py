"""What waits for a GPU, part by part, most important first; each in a process of its own and within its time.

    bash bench/gpu.sh OUT [--only PART ...] [--dry]

is how to start it (gpu.sh makes a bare checkout importable). Every row goes to OUT/history.csv as soon as it is known,
every single time to OUT/history.jsonl, and a table comes last. ``--dry`` goes through all of it with tiny shapes, and
without a GPU in Triton's interpreter.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import pathlib
import signal
import sys
import time
import traceback
from typing import NamedTuple

import torch

if "--dry" in sys.argv and not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton

import gpu_checks
import gpu_races
import gpu_speed
import gpu_tests
from gpu_run import Run
from history import read
from report import summary


class Part(NamedTuple):
    run: object
    seconds: int
    """After which it is ended, unless it runs alone and has all of the time."""


PARTS = {
    "tests": Part(gpu_tests.tests, 170),
    "adamw": Part(gpu_speed.adamw, 60),
    "small": Part(gpu_speed.small, 60),
    "rules": Part(gpu_speed.rules, 100),
    "equal": Part(gpu_checks.equal, 90),
    "stress": Part(gpu_checks.stress, 60),
    "races": Part(gpu_races.races, 80),
    "once": Part(gpu_speed.once, 40),
    "sweep": Part(gpu_speed.sweep, 60),
    "graph": Part(gpu_checks.graph, 30),
    "cold": Part(gpu_checks.cold, 60),
    "huge": Part(gpu_checks.huge, 40),
    "amp": Part(gpu_speed.amp, 40),
    "train": Part(gpu_speed.training, 60),
    "models": Part(gpu_speed.models, 90),
    "packages": Part(gpu_speed.packages, 120),
    "sanitize": Part(gpu_checks.sanitize, 240),
}
"""Most important first. Together they may take longer than MINUTES: what is last then waits for ``--only``."""

MINUTES = 9.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--minutes", type=float, default=MINUTES, help="for everything (default: %(default)s)")
    parser.add_argument("--since", type=float, default=time.time(), help="when it began, in seconds since 1970")
    parser.add_argument("--dry", action="store_true", help="with tiny shapes; without a GPU in the interpreter")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    patience = 10 if options.dry else 1  # a dry run says nothing of times, and may share its cores
    alone = len(options.only) == 1
    end = time.monotonic() + options.since - time.time() + 60 * options.minutes * patience
    run = Run(options.out, options.dry)
    if run.where == "cpu":
        import_for_all()
    for name, part in PARTS.items():
        if name in options.only:
            seconds = min(math.inf if alone else part.seconds * patience, end - time.monotonic())
            if seconds < 15:
                print(f"=== {name}: no time left; run it with --only {name}", flush=True)
            else:
                print(f"=== {name} (at most {seconds:.0f} s)", flush=True)
                within(seconds, name, run)
    rows, problems = read(run.history)
    print(*problems, sep="\n")
    print(summary(rows), flush=True)
    return int(any(row.status in ("failed", "unequal") for row in rows))


def import_for_all() -> None:
    """What every part would take a second to import after its fork: the kernels, and what optimizers of torch do."""
    from fusedopt import triton_backend, triton_norm  # noqa: F401

    triton_norm.SLOTS = 4  # the interpreter runs one program after the other, and the cooperative kernel all slots
    torch.optim.SGD([torch.zeros(1)])


def within(seconds: float, name: str, run: Run) -> None:
    """Run a part in a process of its own, since a GPU's errors stay with a process, and end it when its time is up.

    A new interpreter per part takes seconds; without a GPU a fork does, which cannot take an initialised GPU along.
    """
    begin = time.monotonic()
    run.end = begin + seconds
    start = multiprocessing.get_context("fork" if run.where == "cpu" else "spawn")
    process = start.Process(target=inside, args=(name, run))
    process.start()
    process.join(seconds)
    took = f"{time.monotonic() - begin:.0f} s"
    if process.is_alive():
        kill(process)
        process.join(10)
        run.result(name, "all of it", "failed", f"cut off after {took}; its rows up to then stand")
    elif process.exitcode != 0:
        run.result(name, "all of it", "failed", f"ended with exit code {process.exitcode} after {took}")
    else:
        print(f"--- {name}: {took}", flush=True)


def kill(process: multiprocessing.Process) -> None:
    """With all that it has started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:  # it was still importing
        process.kill()


def inside(name: str, run: Run) -> None:
    os.setsid()  # whatever it starts is ended with it
    try:
        PARTS[name].run(run)
    except Exception as problem:
        traceback.print_exc()
        run.result(name, "all of it", "failed", f"{type(problem).__name__}: {problem}")


if __name__ == "__main__":
    sys.exit(main())
