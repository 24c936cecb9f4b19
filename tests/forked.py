"""Run programs of bench/ one after the other, each in a fork of one process that has imported them all.

A program of its own, started by ``programs.forked()`` with a JSON list of commands, each a list of a program's name and
its arguments: what each printed, and its exit code, is printed as JSON. To import torch takes longer than most of them.
"""

import contextlib
import gc
import importlib
import io
import json
import multiprocessing
import sys
import traceback

import torch
from programs import BENCH, Done


def run(command):
    name, *sys.argv[1:] = command
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = sys.modules[name].main() or 0
        except SystemExit as end:
            code = end.code
        except Exception:
            traceback.print_exc()
            code = 1
    return Done(code, out.getvalue(), err.getvalue())


def main(commands):
    sys.path.insert(0, str(BENCH))
    for name, *_ in commands:
        importlib.import_module(name)
    torch.optim.SGD([torch.zeros(1)])  # imports what every optimizer of torch does
    gc.freeze()
    with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as pool:
        print(json.dumps(pool.map(run, commands, chunksize=1)))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
