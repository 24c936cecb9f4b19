"""Runs groups of ranks, which are forks of this process: it has imported, once, what takes each of them seconds.

    python groups.py FOLDER

Started by launch.py, never by hand. The folder has the jobs, and gets their outcomes.
"""

import gc
import importlib
import multiprocessing
import pickle
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE), str(HERE.parent / "frameworks")]

import conftest as memory  # noqa: E402  (the one of tests/: the interpreter's repairs, and memory that is NaN)
import launch  # noqa: E402
import torch  # noqa: E402
import worker  # noqa: E402

import fusedopt  # noqa: E402
from fusedopt import backends  # noqa: E402

GROUP_LIMIT = 1800
"""Seconds for one process group with all its cases. They take a minute; the limit is for what hangs."""


def main(folder: Path) -> None:
    jobs = pickle.loads((folder / "jobs").read_bytes())
    prepare({case.module for job in jobs for case in job.cases})
    (folder / "outcomes").write_bytes(pickle.dumps([run(job, folder) for job in jobs]))


def prepare(modules: set[str]) -> None:
    """What every rank would do. It starts no thread: forks would lack it, and wait for it."""
    torch.set_num_threads(1)
    for name in ("empty", "empty_like", "empty_strided"):
        setattr(torch, name, memory.poisoned(getattr(torch, name)))
    for module in modules:
        importlib.import_module(module)
    take_a_step()
    gc.freeze()  # as conftest.py does


def take_a_step() -> None:
    """With it come modules that are imported late, and kernels as the interpreter wants them."""
    p = torch.nn.Parameter(torch.ones(1))
    p.grad = torch.ones(1)
    backend = "triton" if backends.triton_problem() is None else None
    fusedopt.AdamW([p], max_grad_norm=1.0, backend=backend).step()


def run(job: launch.Job, folder: Path) -> list[list[launch.Outcome]]:
    """The outcomes of each case, one per rank."""
    outcomes = []
    while len(outcomes) < len(job.cases):
        rest = launch.Job(job.world, job.cases[len(outcomes) :])
        outcomes += run_group(rest, Path(tempfile.mkdtemp(dir=folder)))
    return outcomes


def run_group(job: launch.Job, folder: Path) -> list[list[launch.Outcome]]:
    """The outcomes of the cases up to the first that failed, or of all."""
    fork = multiprocessing.get_context("fork")
    ranks = [fork.Process(target=worker.main, args=(job, rank, folder)) for rank in range(job.world)]
    for process in ranks:
        process.start()
    note = wait(ranks)
    outcomes = []
    for index in range(len(job.cases)):
        done = [outcome(folder / f"{index}.{rank}") for rank in range(job.world)]
        outcomes.append([o or epitaph(note, folder / f"log.{rank}") for rank, o in enumerate(done)])
        if any(outcome.error for outcome in outcomes[-1]):
            break
    return outcomes


def wait(ranks: list[multiprocessing.Process]) -> str:
    """Until all have left or the time is up; then end those that are left."""
    deadline = time.monotonic() + GROUP_LIMIT
    for process in ranks:
        process.join(max(deadline - time.monotonic(), 0.1))
    late = [process for process in ranks if process.exitcode is None]
    for process in late:
        process.kill()
        process.join()
    return f"ended after {GROUP_LIMIT} s" if late else f"left with {[process.exitcode for process in ranks]}"


def outcome(file: Path) -> launch.Outcome | None:
    return pickle.loads(file.read_bytes()) if file.exists() else None


def epitaph(note: str, log: Path) -> launch.Outcome:
    return launch.Outcome(f"no result ({note}):\n{log.read_text(errors='replace')[-3000:]}", 0.0, {})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
