"""What the tests that compile share: which GPUs and Tritons, and how tests/aot.py is run and its report read."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parent / "aot.py"
EXTENT = os.environ.get("FUSEDOPT_COMPILE", "some")
OLD_TRITON = os.environ.get("FUSEDOPT_OLD_TRITON")
NVIDIA = ["sm_75", "sm_80", "sm_90", "sm_100"]
TARGETS = [*NVIDIA, "gfx942"]

# How NVIDIA's kernels access the elements of tensors, which are not wanted again soon; the width follows.
LOAD = r"ld\.global\..*evict_first.*"
STORE = r"st\.global\.cs"

TRITONS = [
    "installed",
    pytest.param(
        "old",
        marks=pytest.mark.skipif(not OLD_TRITON, reason="FUSEDOPT_OLD_TRITON names no folder with another Triton"),
    ),
]


def environment_of(which, paths=()):
    """For a process that compiles with the installed Triton or the old one, and finds modules in ``paths``."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    paths = [*([OLD_TRITON] if which == "old" else []), *paths, environment.get("PYTHONPATH")]
    return environment | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}


def extent(which):
    """How much is compiled with the installed Triton or the old one: see extents.py."""
    return os.environ.get("FUSEDOPT_COMPILE", "core" if which == "old" else EXTENT)


def compiled(which, jobs):
    """What tests/aot.py says by job, with the installed Triton or the old one."""
    # One thread, or Python warns of the forks.
    environment = environment_of(which) | {"FUSEDOPT_COMPILE": extent(which), "OMP_NUM_THREADS": "1"}
    # -W error: what warns us would warn every user.
    command = [sys.executable, "-W", "error", PROGRAM, *jobs]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


def count(kernel, pattern):
    """How many instructions match, once for each time that they stand in the assembly."""
    return sum(number for opcode, number in kernel["opcodes"].items() if re.fullmatch(pattern, opcode))
