"""All rows of a machine without a GPU, most important first, and then the tables and plots.

    python bench/cpu.py --save        at most 12 minutes on one thread; nobody else should use the machine

Without ``--save`` it measures and prints, and writes nothing. What the time did not suffice for is named at the end.
"""

from __future__ import annotations

import argparse
import sys
import time

import report
import torch
import train
from device import device
from history import HISTORY, append, read
from problem import Case
from step import HEADER, USUAL, line, run
from variants import VARIANTS

from fusedopt.__main__ import amount

MAIN = "AdamW", "RMSprop", "SGD", "SGD-momentum"
MODELS = "mlp", "small1000", "resnet50", "groups465", "one50m", "gpt2"
"""From the quickest to the slowest."""

TRAINING_SECONDS = 15.0
"""Per task."""


def cases() -> tuple[list[Case], list[Case]]:
    """What comes before the training, and what after it: the four main optimizers everywhere, then all others, model by
    model; with a GradScaler in between."""
    others = [label for label in VARIANTS if label not in MAIN]
    first = [Case(model, label, clip) for label in MAIN for model in MODELS for clip in (False, True)]
    scaled = [Case(model, "AdamW", True, amp=True) for model in ("mlp", "small1000")]
    rest = [Case(model, label, clip) for model in MODELS for label in others for clip in (False, True)]
    few = [case for case in rest if case.model in ("mlp", "small1000")]
    return first, [*few, *scaled, *(case for case in rest if case not in few)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", action="store_true", help="append the rows to bench/history.csv, and report")
    parser.add_argument("--minutes", type=float, default=11.5, help="no case begins later (default: %(default)s)")
    parser.add_argument("--threads", type=amount, default=1, help="default: %(default)s")
    options = parser.parse_args()
    deadline = time.monotonic() + 60 * options.minutes
    torch.set_num_threads(options.threads)
    on, out = device("cpu"), HISTORY if options.save else None
    first, rest = cases()
    print(HEADER, flush=True)
    made = run(first, USUAL, on, deadline=deadline, out=out)
    for task in train.TASKS:
        rows = train.measure(task, on, min(TRAINING_SECONDS, deadline - time.monotonic()))
        print(*map(line, rows), sep="\n", flush=True)
        if out is not None:
            append(rows, out)
    made += run(rest, USUAL, on, deadline=deadline, out=out)
    if options.save:
        for problem in read(HISTORY)[1]:
            print(f"not used: {problem}", file=sys.stderr)
        report.write()
    return int(any(row.status in ("failed", "unequal") for row in made))


if __name__ == "__main__":
    sys.exit(main())
