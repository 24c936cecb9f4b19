"""What torch's profiler saw: launches, copies, synchronizations, and the peak of a CPU's memory."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch

# It says on stderr when it starts and stops.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

LABEL = "measured step"
WAITS = "Synchronize"
"""In the names of calls with which the host waits for the device. ``cudaMemcpy`` without ``Async`` waits too."""


class Seen(NamedTuple):
    """Per step, what a device was given to do."""

    launches: float
    copies: float
    waits: float
    kernels: dict[str, list[float]]
    """By name, how long each launch took on the device, in microseconds."""


def watch(step: Callable[[], None], steps: int = 3) -> Seen:
    """Profile a few steps. Waits are counted only while ``step`` runs: the profiler itself waits afterwards."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(steps):
            with torch.profiler.record_function(LABEL):
                step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    return summary(events(profiler), steps)


def events(profiler: Any) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        return json.loads(path.read_text())["traceEvents"]


def summary(trace: Iterable[dict[str, Any]], steps: int) -> Seen:
    """Count a trace of so many steps."""
    trace = [event for event in trace if event.get("ph") == "X"]
    spans = [
        (event["ts"], event["ts"] + event["dur"])
        for event in trace
        if event["name"] == LABEL and event.get("cat") == "user_annotation"
    ]
    kernels: dict[str, list[float]] = {}
    for event in trace:
        if event.get("cat") == "kernel":
            kernels.setdefault(event["name"], []).append(event["dur"])
    copies = sum(event.get("cat") in ("gpu_memcpy", "gpu_memset") for event in trace)
    waits = sum(
        event.get("cat") in ("cuda_runtime", "cuda_driver")
        and _waits(event["name"])
        and any(start <= event["ts"] <= end for start, end in spans)
        for event in trace
    )
    return Seen(sum(map(len, kernels.values())) / steps, copies / steps, waits / steps, kernels)


def _waits(name: str) -> bool:
    return WAITS in name or ("Memcpy" in name and "Async" not in name)


def cpu_peak(action: Callable[[], None]) -> int:
    """The most bytes that ``action`` held at once, of those that it allocated through torch on the CPU."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        action()
    held = peak = 0
    allocations = (e for e in events(profiler) if e.get("name") == "[memory]" and e["args"].get("Device Type") == 0)
    for event in sorted(allocations, key=lambda event: event["ts"]):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return peak
