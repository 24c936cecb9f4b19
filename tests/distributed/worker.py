"""One rank of a process group that runs many cases.

A rank that fails in one leaves at once, so that the others, which may be waiting for it, fail as well instead of
waiting for the time limit.
"""

import faulthandler
import functools
import importlib
import os
import pickle
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path

import launch
import torch
import torch.distributed as dist

CASE_LIMIT = 240
"""Seconds, twenty times as many as a case takes on busy cores, after which it is given up, with every thread's place
in its code on stderr."""


def main(job: launch.Job, rank: int, folder: Path) -> None:
    """In a process that has imported the cases' modules."""
    with (folder / f"log.{rank}").open("wb") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'store'}",
        rank=rank,
        world_size=job.world,
        timeout=timedelta(seconds=120),
    )
    for index, case in enumerate(job.cases):
        faulthandler.dump_traceback_later(CASE_LIMIT, exit=True)
        begin, error = time.monotonic(), None
        launch.measured.clear()
        try:
            run(case, folder / f"case{index}")
        except BaseException:  # DCP's CheckpointException is no Exception
            error = traceback.format_exc()
        outcome = launch.Outcome(error, time.monotonic() - begin, dict(launch.measured))
        part = folder / f"{index}.{rank}.part"
        part.write_bytes(pickle.dumps(outcome))
        part.rename(folder / f"{index}.{rank}")
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
