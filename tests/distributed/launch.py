"""Process groups on this machine that run many cases each, because starting one takes seconds.

A case that breaks its group (an error, a crash, a time limit) is reported, and the cases after it run in a new group.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pickle
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

measured: dict[str, float] = {}
"""What the running case has measured, for the report: ``pytest -rP`` shows it."""


@dataclasses.dataclass
class Case:
    module: str
    function: str
    arguments: dict[str, Any]


@dataclasses.dataclass
class Job:
    """Cases for groups of ``world`` ranks."""

    world: int
    cases: list[Case]


@dataclasses.dataclass
class Outcome:
    """How one case ended on one rank."""

    error: str | None
    seconds: float
    measured: dict[str, float]


def run(jobs: list[Job]) -> list[list[list[Outcome]]]:
    """The outcomes of each job's cases, one per rank."""
    with tempfile.TemporaryDirectory(prefix="fusedopt-") as name:
        folder = Path(name)
        (folder / "jobs").write_bytes(pickle.dumps(jobs))
        log = folder / "log"
        with log.open("wb") as output, _started(folder, output) as groups:
            groups.wait()
        if groups.returncode:
            raise RuntimeError(f"groups.py left with {groups.returncode}:\n{log.read_text(errors='replace')[-3000:]}")
        return pickle.loads((folder / "outcomes").read_bytes())


@contextlib.contextmanager
def _started(folder: Path, output: Any):
    """A process that has imported everything and forks the ranks. They all end with this."""
    # The ranks' tensors are on the CPU, and so their kernels in the interpreter, whatever else is here.
    without_gpus = dict.fromkeys(("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"), "")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"} | without_gpus
    command = [sys.executable, str(Path(__file__).with_name("groups.py")), str(folder)]
    with subprocess.Popen(
        command, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
    ) as groups:
        try:
            yield groups
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(groups.pid, signal.SIGKILL)
