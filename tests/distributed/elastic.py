"""torch.distributed.run, several times in one process that has imported everything, of which the ranks are forks.

    python elastic.py 'ARGUMENTS OF torch.distributed.run' ...

Rank 1 of a run that may be restarted is killed in its first life, between two checkpoints.
"""

import os
import shlex
import signal
import sys

import torch
from torch.distributed.launcher.api import elastic_launch
from torch.distributed.run import config_from_args, parse_args

from fusedopt import demo_distributed

LAST_STEP = 5


def main(runs: list[str]) -> None:
    torch.set_num_threads(1)
    torch.optim.SGD([torch.zeros(1)])  # imports torch._dynamo
    for arguments in runs:
        options = parse_args(["--start-method", "fork", *shlex.split(arguments)])
        config, _, _ = config_from_args(options)
        entry = mortal if config.max_restarts else demo_distributed.main
        elastic_launch(config, entry)(options.training_script_args)


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
    main(sys.argv[1:])
