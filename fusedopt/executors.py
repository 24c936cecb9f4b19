"""What runs the buckets of a plan, and whether it does so in one launch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from . import clipping, torch_backend, torch_forms
from .buckets import Bucket
from .distributed import Reduction
from .settings import Settings


def make_executor(bucket: Bucket, settings: Settings) -> Any:
    if bucket.backend.name == "torch":
        kind = torch_backend.Executor if bucket.stored.plain else torch_forms.Executor
        return kind(bucket, settings)
    from . import triton_backend

    return triton_backend.Executor(bucket, settings)


def judge_of(executors: list[Any]) -> Callable[..., clipping.Verdict]:
    """The function that judges the gradients of these executors, with ``clipping.judge``'s arguments: on the one GPU
    that holds all of them, or else on the host."""
    devices = {(executor.bucket.backend.name, executor.bucket.device) for executor in executors}
    if len(devices) == 1 and executors[0].bucket.backend.name == "triton":
        return executors[0].judge
    return clipping.judge


def compile_ahead(executors: list[Any], *step: Any) -> None:
    """Compile the kernels of a first step together, where one device holds all buckets: see ``triton_ahead``."""
    if judge_of(executors) is not clipping.judge:
        executors[0].compile_ahead(executors, *step)


def prefer_one_launch(executors: list[Any]) -> bool:
    """Whether the tuning table of the GPU says that one launch for norm and update is faster."""
    return any(executor.bucket.backend.name == "triton" and executor.prefers_one_launch for executor in executors)


def problem_with_one_launch(
    optimizer: Any, executors: list[Any], terms: clipping.Terms, reduction: Reduction, is_deferred: bool
) -> str | None:
    """Why norm and update of these executors cannot run as one launch, or None."""
    bucket = executors[0].bucket
    if bucket.backend.name != "triton":
        return f"the backend is {bucket.backend} ({bucket.backend.reason})"
    if len(executors) > 1:
        return f"parameters of {len(executors)} devices, dtypes, rules or forms of states take a launch each"
    if is_deferred:
        return "clip_grad_norm_() takes the norm before the step"
    if reduction.communicates and terms.joins_ranks:
        return "the norm is taken over several ranks"
    return executors[0].problem_with_one_launch(optimizer)
