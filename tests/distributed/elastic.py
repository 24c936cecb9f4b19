"""Runs of fusedopt.demo_distributed, of which all ranks are forks of this process, which has imported everything.

    python elastic.py 'ARGUMENTS OF THE PROGRAM' 'ARGUMENTS OF torch.distributed.run' ...

First the program alone, then under torch.distributed.run. Rank 1 of a run that may be restarted is killed in its first
life, between two checkpoints.
"""

import functools
import multiprocessing
import os
import runpy
import shlex
import signal
import sys

import torch
from torch.distributed.launcher.api import elastic_launch
from torch.distributed.run import config_from_args, parse_args

from fusedopt import demo_distributed

LAST_STEP = 5
LETTERS = 8
"""That the model writes on several ranks; 120, as it writes alone, take nearly as long as all else."""


def main(alone: str, *runs: str) -> None:
    torch.set_num_threads(1)
    torch.optim.SGD([torch.zeros(1)])  # imports torch._dynamo
    process = multiprocessing.get_context("fork").Process(target=program, args=(alone,))
    process.start()
    process.join()
    if process.exitcode:
        sys.exit(process.exitcode)
    demo_distributed.written = functools.partial(demo_distributed.written, length=LETTERS)
    for arguments in runs:
        options = parse_args(["--start-method", "fork", *shlex.split(arguments)])
        config, _, _ = config_from_args(options)
        entry = mortal if config.max_restarts else demo_distributed.main
        elastic_launch(config, entry)(options.training_script_args)


def program(arguments: str) -> None:
    sys.argv[1:] = shlex.split(arguments)
    # Anew, as by python -m.
    del sys.modules["fusedopt.demo_distributed"]
    runpy.run_module("fusedopt.demo_distributed", run_name="__main__")


def mortal(arguments: list[str]) -> None:
    advance = demo_distributed.Training.advance

    def advance_or_die(training, *batch):
        if training.step == LAST_STEP:
            os.kill(os.getpid(), signal.SIGKILL)
        return advance(training, *batch)

    if (os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]) == ("1", "0"):
        demo_distributed.Training.advance = advance_or_die
    demo_distributed.main(arguments)


if __name__ == "__main__":
    main(*sys.argv[1:])
