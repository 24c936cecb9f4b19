"""Process groups on this machine that run many cases each, because starting one takes seconds.

A case that breaks its group (an error, a crash, a time limit) is reported, and the cases after it run in a new group.
"""

from __future__ import annotations

import dataclasses
import os
import pickle
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

GROUP_LIMIT = 1800
"""Seconds for one process group with all its cases. They take one to three minutes; the limit is for what hangs."""

measured: dict[str, float] = {}
"""What the running case has measured, for the report: ``pytest -rP`` shows it."""


@dataclasses.dataclass
class Case:
    module: str
    function: str
    arguments: dict[str, Any]


@dataclasses.dataclass
class Job:
    world: int
    cases: list[Case]


@dataclasses.dataclass
class Outcome:
    """How one case ended on one rank."""

    error: str | None
    seconds: float
    measured: dict[str, float]


def run(world: int, cases: list[Case]) -> list[list[Outcome]]:
    """The outcomes of each case, one per rank."""
    outcomes: list[list[Outcome]] = []
    while len(outcomes) < len(cases):
        outcomes += _run_group(Job(world, cases[len(outcomes) :]))
    return outcomes


def _run_group(job: Job) -> list[list[Outcome]]:
    """The outcomes of the cases up to the first that failed, or of all."""
    with tempfile.TemporaryDirectory(prefix="fusedopt-") as name:
        folder = Path(name)
        file = folder / "job"
        file.write_bytes(pickle.dumps(job))
        logs = [folder / f"log.{rank}" for rank in range(job.world)]
        ranks = [_start(file, rank, logs[rank]) for rank in range(job.world)]
        note = _wait(ranks)
        outcomes = []
        for index in range(len(job.cases)):
            done = [_outcome(folder / f"{index}.{rank}") for rank in range(job.world)]
            outcomes.append([o or Outcome(_epitaph(note, log), 0.0, {}) for o, log in zip(done, logs)])
            if any(outcome.error for outcome in outcomes[-1]):
                break
        return outcomes


def _start(file: Path, rank: int, log: Path) -> subprocess.Popen:
    # The ranks' tensors are on the CPU, and so their kernels in the interpreter, whatever else is here.
    without_gpus = dict.fromkeys(("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"), "")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"} | without_gpus
    command = [sys.executable, str(Path(__file__).with_name("worker.py")), str(file), str(rank)]
    with log.open("wb") as output:
        return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)


def _wait(ranks: list[subprocess.Popen]) -> str:
    """Until all have left or the time is up; then end those that are left."""
    deadline = time.monotonic() + GROUP_LIMIT
    try:
        for process in ranks:
            process.wait(max(deadline - time.monotonic(), 0.1))
    except subprocess.TimeoutExpired:
        return f"ended after {GROUP_LIMIT} s"
    finally:
        for process in ranks:
            if process.poll() is None:
                process.kill()
                process.wait()
    return f"left with {[process.returncode for process in ranks]}"


def _outcome(file: Path) -> Outcome | None:
    return pickle.loads(file.read_bytes()) if file.exists() else None


def _epitaph(note: str, log: Path) -> str:
    return f"no result ({note}):\n{log.read_text(errors='replace')[-3000:]}"
