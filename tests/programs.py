"""The programs of bench/, for the tests of them: in processes of their own."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
BENCH = ROOT / "bench"


def program(*arguments, **environment):
    """A program of bench/ in a process of its own, without the interpreter unless it asks for it, and not as one of
    several that share the tests, where pytest-benchmark would not measure."""
    inherited = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET" and not k.startswith("PYTEST_XDIST")}
    path = os.pathsep.join([str(Path(sys.executable).parent), inherited.get("PATH", "")])
    return subprocess.run(
        list(map(str, arguments)), env=inherited | {"PATH": path, **environment}, capture_output=True, text=True
    )


class Done(NamedTuple):
    """How a program ended."""

    returncode: int
    stdout: str
    stderr: str


def forked(*commands):
    """Several runs of programs of bench/, each a module's name and its arguments, in forks of one process."""
    commands = [list(map(str, command)) for command in commands]
    done = program(sys.executable, Path(__file__).with_name("forked.py"), json.dumps(commands), OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr[-4000:]
    return [Done(*found) for found in json.loads(done.stdout)]
