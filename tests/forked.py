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

import without_dynamo
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
    if "host" in sys.modules:
        sys.modules["host"].import_for_all()
    else:
        without_dynamo.prepare()
    gc.freeze()
    print(json.dumps([alone(command) for command in commands]))


def alone(command):
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    # No pool: its processes must not fork, which some of the programs do.
    process = context.Process(target=lambda: sender.send(run(command)))
    process.start()
    sender.close()
    done = receiver.recv()
    process.join()
    return done


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
