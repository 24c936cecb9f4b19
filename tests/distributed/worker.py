"""One rank of a process group that runs many cases: started by launch.py, never by hand.

    python worker.py JOB RANK

The job is a pickled list of cases. A rank that fails in one leaves at once, so that the others, which may be waiting
for it, fail as well instead of waiting for the time limit.
"""

import faulthandler
import functools
import gc
import importlib
import os
import pickle
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE), str(HERE.parent / "frameworks")]

import conftest as memory  # noqa: E402  (the one of tests/: the interpreter's repairs, and memory that is NaN)
import launch  # noqa: E402

CASE_LIMIT = 240
"""Seconds, twenty times as many as a case takes on busy cores, after which it is given up, with every thread's place
in its code on stderr."""


def main(job_file: str, rank: int) -> None:
    job = pickle.loads(Path(job_file).read_bytes())
    results = Path(job_file).parent
    dist.init_process_group(
        "gloo",
        init_method=f"file://{results / 'store'}",
        rank=rank,
        world_size=job.world,
        timeout=timedelta(seconds=120),
    )
    torch.set_num_threads(1)
    for name in ("empty", "empty_like", "empty_strided"):
        setattr(torch, name, memory.poisoned(getattr(torch, name)))
    for module in {case.module for case in job.cases}:
        importlib.import_module(module)
    gc.freeze()  # as conftest.py does
    for index, case in enumerate(job.cases):
        faulthandler.dump_traceback_later(CASE_LIMIT, exit=True)
        begin, error = time.monotonic(), None
        launch.measured.clear()
        try:
            run(case, results / f"case{index}")
        except BaseException:  # DCP's CheckpointException is no Exception
            error = traceback.format_exc()
        outcome = launch.Outcome(error, time.monotonic() - begin, dict(launch.measured))
        part = results / f"{index}.{rank}.part"
        part.write_bytes(pickle.dumps(outcome))
        part.rename(results / f"{index}.{rank}")
        if error:
            leave(1)
        dist.barrier()
    leave(0)


def run(case: launch.Case, folder: Path) -> None:
    function = getattr(importlib.import_module(case.module), case.function)
    arguments = dict(case.arguments)
    if "folder" in arguments:
        folder.mkdir(exist_ok=True)
        arguments["folder"] = folder
    function = functools.partial(function, **arguments)
    torch.manual_seed(0)
    function()


def leave(code: int) -> None:
    """Without gloo's clean-up, which sometimes aborts ("terminate called without an active exception")."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
