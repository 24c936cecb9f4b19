"""Time a case: all implementations in one process, round by round and in turns, as medians and quartiles."""

from __future__ import annotations

import dataclasses
import gc
import random
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import shapes
from device import Cpu, copy_bandwidth, surroundings
from history import Row
from problem import Case, Problem, Unequal, check
from profiles import Seen, watch
from rivals import CLIPS, TORCH, Missing

ROUND = 0.004
"""Seconds that one round of one implementation should last at least."""

Models = Mapping[str, shapes.Groups]

NORM_KERNEL = "sum_of_squares"

KERNELS = NORM_KERNEL, "step_", "clipped_"
"""How the names of kernels begin of which it is known how much they move."""

LAUNCH_QUEUE = 1000
"""Launches that a GPU's queue holds. A host that queues more is made to wait, and its time is no longer its own."""


@dataclasses.dataclass
class Result:
    """What was seen of one implementation. Times are seconds per step, one per round."""

    name: str
    status: str = "ok"
    note: str = ""
    wall: list[float] = dataclasses.field(default_factory=list)
    host: list[float] = dataclasses.field(default_factory=list)
    busy: list[float] = dataclasses.field(default_factory=list)
    first: float | None = None
    memory: int | None = None
    bytes: int | None = None
    gradient_bytes: int = 0
    seen: Seen | None = None


def measure(
    case: Case,
    names: Iterable[str],
    on: Cpu,
    seconds: float,
    models: Models = shapes.MODELS,
    backend: str | None = None,
) -> list[Result]:
    """One result per implementation.

    Five rounds at least, or two if ``seconds`` is 0 and no number matters. Who cannot run or does not agree with torch
    gets a result that says so, and is not timed.
    """
    groups = models[case.model]
    results = {name: Result(name) for name in names}
    problem = Problem(case, groups, on.name, backend)
    steps: dict[str, Callable[[], None]] = {}
    for name, result in results.items():
        try:
            check(case, groups, on.name, name, backend)
            steps[name] = _begin(problem, on, result)
        except Missing as problem_:
            result.status, result.note = "skipped", str(problem_)
        except Unequal as problem_:
            result.status, result.note = "unequal", str(problem_)
        except Exception as problem_:
            # A rival's error is a line of the table, not the end of the run.
            result.status, result.note = "failed", f"{type(problem_).__name__}: {problem_}".splitlines()[0]
    _rounds(steps, results, on, seconds, problem.limit.restore)
    if on.name == "cuda":
        for name, step in steps.items():
            results[name].seen = _watched(step, results[name])
        _device_rounds(steps, results, on)
    steps.clear()
    gc.collect()
    return list(results.values())


def _begin(problem: Problem, on: Cpu, result: Result) -> Callable[[], None]:
    """Make the optimizer and take its first step, which builds states and plans. (Kernels were compiled by the check;
    first_step.py times that.)"""
    made = problem.parameters()
    step: Callable[[], None] | None = None

    def first() -> None:
        nonlocal step
        optimizers.append(problem.made(result.name, made))
        step = optimizers[0][1]
        on.settle()
        begin = time.perf_counter()
        step()
        on.settle()
        result.first = time.perf_counter() - begin

    optimizers: list = []
    result.memory = on.peak(first)
    result.bytes = problem.bytes_needed(optimizers[0][0])
    result.gradient_bytes = sum(g.nbytes for group in problem.grads for g in group)
    return step


def _rounds(
    steps: dict[str, Callable[[], None]],
    results: dict[str, Result],
    on: Cpu,
    seconds: float,
    between: Callable[[], None],
) -> None:
    if not steps:
        return
    inner = {name: max(1, int(ROUND / max(_warm(step, on), 1e-7))) if seconds else 1 for name, step in steps.items()}
    deadline = time.perf_counter() + seconds
    names, order = list(steps), random.Random(0)
    count = 0
    while count < (5 if seconds else 2) or (time.perf_counter() < deadline and count < 100):
        # Turns by chance: who always came after the same one would find its code, or another's, in the caches.
        order.shuffle(names)
        for name in names:
            results[name].wall.append(_wall(steps[name], on, inner[name]))
        between()
        count += 1


def _watched(step: Callable[[], None], result: Result) -> Seen | None:
    """What the profiler sees. Without it the times stand, and the row says so."""
    try:
        return watch(step)
    except Exception as problem:
        result.note = f"not profiled: {type(problem).__name__}: {problem}".splitlines()[0]
        return None


def _warm(step: Callable[[], None], on: Cpu) -> float:
    """Not the first step after somebody else's, which is several times slower, and not equally for everybody."""
    return min(_wall(step, on, 1) for _ in range(4))


def _device_rounds(steps: dict[str, Callable[[], None]], results: dict[str, Result], on: Cpu, rounds: int = 9) -> None:
    """What the host and the device need each by itself."""
    names, order = list(steps), random.Random(0)
    for _ in range(rounds):
        order.shuffle(names)
        for name in names:
            on.settle()
            begin = time.perf_counter()
            steps[name]()
            host = time.perf_counter() - begin
            results[name].host.append(host)
            on.settle()
            if results[name].seen is None or results[name].seen.launches < LAUNCH_QUEUE:
                results[name].busy.append(on.busy(steps[name], 1, host))


def _wall(step: Callable[[], None], on: Cpu, repeats: int) -> float:
    """Seconds per step, the device's work included."""
    on.settle()
    begin = time.perf_counter()
    for _ in range(repeats):
        step()
    on.settle()
    return (time.perf_counter() - begin) / repeats


def outline(case: Case, on: Cpu, part: str, implementation: str, models: Models = shapes.MODELS, **values: Any) -> Row:
    """A row that says where and what, and what ``values`` add."""
    groups = models[case.model]
    return Row(
        **surroundings(on.name), **{"clock": on.clocks(), **values}, part=part, model=case.model,
        tensors=shapes.tensors(groups), elements=shapes.elements(groups), optimizer=case.variant, dtype=case.dtype,
        clip=case.clip, amp=case.amp, implementation=implementation,
    )  # fmt: skip


def rows(case: Case, results: list[Result], on: Cpu, models: Models = shapes.MODELS) -> list[Row]:
    """The results as rows, each compared with torch's best by the ratios of interleaved rounds; and one row for each
    kernel of ours that the profiler saw."""
    copy = copy_bandwidth(on)
    blank = outline(case, on, "step", "", models, copy_gbs=round(copy / 1e9, 1))
    timed = {result.name: result for result in results if result.wall}
    best = min((n for n in timed if n in TORCH), key=lambda name: statistics.median(timed[name].wall), default=None)
    made = []
    for result in results:
        row = dataclasses.replace(
            blank, implementation=result.name, status=result.status, note=result.note, rounds=len(result.wall)
        )
        made.append(row)
        if result.wall:
            _fill(row, result, copy)
            if best is not None:
                rival = timed[best].wall
                low, ratio, high = _quartiles([a / b for a, b in zip(result.wall, rival)])
                row.rival, row.rival_us = best, microseconds(statistics.median(rival))
                row.ratio, row.ratio_low, row.ratio_high = round(ratio, 3), round(low, 3), round(high, 3)
        if result.name in CLIPS and result.seen is not None:
            made += _kernel_rows(blank, result, copy)
    return made


def _fill(row: Row, result: Result, copy: float) -> None:
    row.wall_low, row.wall_us, row.wall_high = map(microseconds, _quartiles(result.wall))
    row.host_us = microseconds(statistics.median(result.host)) if result.host else None
    row.device_us = microseconds(statistics.median(result.busy)) if result.busy else None
    row.first_ms = round(result.first * 1e3, 1)
    row.memory_bytes, row.bytes = result.memory, result.bytes
    if result.bytes is not None:
        row.bandwidth = round(result.bytes / statistics.median(result.busy or result.wall) / copy, 3)
    if result.seen is not None:
        row.launches, row.waits = result.seen.launches, result.seen.waits


def _kernel_rows(blank: Row, result: Result, copy: float) -> Iterator[Row]:
    """How long each kernel takes by itself: the norm, which reads the gradients, and the update."""
    kernels = {name: times for name, times in result.seen.kernels.items() if name.startswith(KERNELS)}
    norm = result.gradient_bytes if NORM_KERNEL in kernels else 0
    for kernel, times in kernels.items():
        took = statistics.median(times)
        moved = norm if kernel == NORM_KERNEL else result.bytes - norm
        share = round(moved / (took * 1e-6) / copy, 3)
        yield dataclasses.replace(
            blank, part="kernel", implementation=f"{result.name}: {kernel}", device_us=round(took, 1),
            bytes=moved, bandwidth=share, rounds=len(times),
        )  # fmt: skip


def microseconds(seconds: float) -> float:
    return round(seconds * 1e6, 1)


def _quartiles(values: list[float]) -> tuple[float, float, float]:
    return tuple(statistics.quantiles(values, n=4))
