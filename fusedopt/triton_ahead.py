"""The kernels of the first step, compiled side by side before any of them is launched.

Triton's passes and ptxas run without Python's lock. Threads compile and nothing else: what needs the device is left to
this one, which then loads the kernels from Triton's cache. So a kernel that cannot run here is found out while nothing
has been changed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import Context
from typing import Any

from triton import AsyncCompileMode

from . import triton_norm
from .backends import interpreting
from .clipping import UNJUDGED, Terms, Verdict
from .cohorts import StepNumbers
from .distributed import Reduction
from .skips import Skips
from .upload import capturing, on


def compile_ahead(
    executors: Sequence[Any],
    update: StepNumbers,
    judged: Verdict | None,
    terms: Terms,
    skips: Skips,
    reduction: Reduction,
) -> None:
    """Compile what judging and updating the buckets of one device takes, side by side, and load it.

    Args:
        executors: one per bucket, each holding its gradients; none of them has launched an update yet.
        update: the numbers of the step.
        judged: the verdict, if it was passed already.
        terms: what to judge the gradients by otherwise.
        skips: where a skipped step is counted.
        reduction: what makes the norm over this rank's gradients one over all.

    Raises:
        KernelFailed: if one of them cannot be compiled or loaded.
    """
    device = executors[0].bucket.device
    if interpreting() or capturing(device):
        return
    with _foreseen(executors) as compilations:
        verdict = judged
        if verdict is None:
            verdict = terms.left_to(skips.verdict(device)) if terms.any else UNJUDGED
        # First the updates, which take longest.
        for executor in executors:
            executor.foresee(update, verdict, skips)
        if judged is None and terms.any:
            triton_norm.foresee(executors, terms, skips.verdict(device), reduction)
    with on(device):
        if len(compilations) > 1:
            # In a context of its own, so that nothing of the mode is left behind, whatever happens.
            Context().run(_side_by_side, compilations)
        for load in compilations:
            load()


@contextlib.contextmanager
def _foreseen(executors: Sequence[Any]) -> Iterator[list[Callable[[], Any]]]:
    """What would be launched inside, as calls that compile it."""
    compilations: list[Callable[[], Any]] = []
    for executor in executors:
        executor.launch.foreseen = compilations
    try:
        yield compilations
    finally:
        for executor in executors:
            executor.launch.foreseen = None


def _side_by_side(compilations: list[Callable[[], Any]]) -> None:
    # What cannot be compiled is compiled once more when it is loaded, and says so there. (In releases such as 3.11.7,
    # Python's parser now and then fails where several threads use it: cpython issue 106905.)
    with ThreadPoolExecutor() as pool, AsyncCompileMode(pool, ignore_errors=True):
        for start in compilations:
            start(load=False)
