"""Clocks, memory and surroundings of the machine that measures. Recorded, never changed."""

from __future__ import annotations

import datetime
import functools
import os
import pathlib
import platform
import subprocess
import time
import warnings
from collections.abc import Callable

import profiles
import torch

CYCLES = 2e9
"""Per second, at most: for how long ``torch.cuda._sleep`` lasts."""


class Cpu:
    """Everything happens at once, so the host's time is all there is."""

    name = "cpu"
    copy_bytes = 2**26
    """Of the copy that says how fast its memory is: several times any cache. (It takes a CPU some 10 ms.)"""

    def settle(self) -> None:
        pass

    def busy(self, step: Callable[[], None], repeats: int, host: float = 0.0) -> float | None:
        """Seconds per step that the device works, without the gaps between launches; None where nobody can tell.
        ``host``: seconds that the host needs to queue one step."""
        return None

    def peak(self, action: Callable[[], None]) -> int:
        """The most bytes above what was allocated before."""
        return profiles.cpu_peak(action)

    def capture(self, step: Callable[[], None]) -> Callable[[], None]:
        """``step`` as a graph: a call replays it."""
        return step

    def alongside(self, action: Callable[[], None], in_order: bool = False) -> None:
        """Run ``action`` on a stream of its own; ``in_order``: behind what was queued here."""
        action()

    def join(self) -> None:
        """What is queued here from now on runs behind what was queued there."""

    def delay(self, seconds: float) -> None:
        """Keep the device from what is queued behind this, for about so long."""

    def clocks(self) -> str:
        try:
            lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
            return f"{max(float(line.split(':')[1]) for line in lines if line.startswith('cpu MHz')):.0f} MHz"
        except (OSError, ValueError):
            return ""


class Cuda(Cpu):
    name = "cuda"
    copy_bytes = 2**30

    def __init__(self) -> None:
        self.side = torch.cuda.Stream()

    def settle(self) -> None:
        torch.cuda.synchronize()

    def busy(self, step: Callable[[], None], repeats: int, host: float = 0.0) -> float | None:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        # The device waits until the host has queued everything.
        self.delay(0.002 + 2 * host * repeats)
        start.record()
        for _ in range(repeats):
            step()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) * 1e-3 / repeats

    def peak(self, action: Callable[[], None]) -> int:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        action()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def capture(self, step: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        return graph.replay

    def alongside(self, action: Callable[[], None], in_order: bool = False) -> None:
        if in_order:
            self.side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.side):
            action()

    def join(self) -> None:
        torch.cuda.current_stream().wait_stream(self.side)

    def delay(self, seconds: float) -> None:
        torch.cuda._sleep(int(CYCLES * seconds))

    def clocks(self) -> str:
        try:
            return f"{torch.cuda.clock_rate()} MHz"
        except Exception:  # it needs a package that may be missing
            return ""


def device(name: str | None = None) -> Cpu:
    """The device of that name, by default a GPU where there is one. From then on a case fails where torch takes a step
    that is meant for our kernels."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    warnings.filterwarnings("error", ".*: torch(.optim's own step runs| takes the steps) on ", UserWarning)
    return Cuda() if name == "cuda" else Cpu()


def bits(x: torch.Tensor) -> torch.Tensor:
    """Its numbers as integers: equal where all bits are."""
    return x.contiguous().view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def copy_bandwidth(on: Cpu) -> float:
    """Bytes read and written per second by a copy: the ceiling for everything that streams through memory."""
    source = torch.empty(on.copy_bytes // 4, device=on.name).fill_(1.0)
    target = torch.empty_like(source)
    times = []
    for _ in range(10):
        took = on.busy(lambda: target.copy_(source), 3)
        if took is None:
            begin = time.perf_counter()
            target.copy_(source)
            took = time.perf_counter() - begin
        times.append(took)
    return 2 * source.nbytes / sorted(times)[len(times) // 2]


@functools.cache
def surroundings(name: str) -> dict[str, str | int]:
    """What every row of one run shares."""
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = "none"
    commit = os.environ.get("FUSEDOPT_COMMIT") or subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=pathlib.Path(__file__).parent, capture_output=True, text=True, check=False,
    ).stdout.strip()  # fmt: skip
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit,
        "machine": (_smi("name") or torch.cuda.get_device_name()) if name == "cuda" else processor(),
        "driver": _smi("driver_version") if name == "cuda" else "",
        "device": name,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton_version,
    }


def processor() -> str:
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _smi(fields: str) -> str:
    """What the driver's own tool says; empty where it is missing (AMD, containers without it)."""
    try:
        command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader", "-i", "0"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip().replace(", ", " / ") if done.returncode == 0 else ""
