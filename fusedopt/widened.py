"""16-bit tensors on a CPU: what is computed of a block is float32, and each result is rounded once."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .blocks import scratch
from .buckets import Bucket
from .cohorts import Cohort
from .rule import Rule, Update
from .settings import Settings
from .storage import NARROW
from .torch_stages import follow

FLOAT = frozenset((torch.float32,))

COPIED = 1 << 16
"""Elements per block of which there are copies in a wider dtype: these fit the second cache."""


def widened(tensors: Sequence[Tensor], dtype: torch.dtype, role: str = "") -> list[Tensor]:
    """The same values in a wider dtype: those that have it as they are, copies of the others, on a CPU good until the
    next ones of this role are asked for."""
    if not tensors[0].is_cpu:
        return [x.to(dtype) for x in tensors]
    wide = [x if x.dtype == dtype else scratch(f"{role}{k}", x, dtype) for k, x in enumerate(tensors)]
    torch._foreach_copy_(wide, tensors)
    return wide


def fused_step(bucket: Bucket, settings: Settings) -> Callable[..., None] | None:
    """What updates one block by torch's fused kernel, where the rule has one that is right in float32 but not in this
    bucket's dtypes: ``step(tensors, g, cohort, scale, update)``, where tensors are the parameter's block, its states'
    and those of the averages that follow it, and ``scale`` divides the gradient."""
    rule = bucket.rule
    is_changed = settings.cautious or settings.looks_inside
    # A gradient that is not copied would be changed.
    is_narrow = bucket.dtype in NARROW and bucket.grad_dtype in NARROW and bucket.stored.plain
    if bucket.fused or is_changed or rule.takes_sizes or not is_narrow or not rule.fuses(bucket.device, FLOAT):
        return None
    dtypes = {bucket.dtype, bucket.grad_dtype, *bucket.stored.dtypes}
    update_block = _update_narrow if rule.fused_narrow is not None and len(dtypes) == 1 else _update_copies

    def step(tensors: Sequence[Tensor], g: Tensor, cohort: Cohort, scale: Tensor | None, update: Update) -> None:
        count = len(tensors) - len(update.averages)
        p = update_block(rule, tensors[:count], g, cohort, scale)
        for average, weight in zip(tensors[count:], update.averages):
            _follow(average, tensors[0] if weight == 1 and average.dtype == bucket.dtype else p, weight)

    return step


def _update_narrow(rule: Rule, tensors: Sequence[Tensor], g: Tensor, cohort: Cohort, scale: Tensor | None) -> Tensor:
    p, *states = tensors
    done = rule.fused_narrow(p, g, states, cohort.t + 1, cohort.group, scale, *cohort.scalars)
    return _update_copies(rule, tensors, g, cohort, scale) if done is NotImplemented else p


def _update_copies(rule: Rule, tensors: Sequence[Tensor], g: Tensor, cohort: Cohort, scale: Tensor | None) -> Tensor:
    """Returns the new parameter before it is rounded."""
    p, *states, gradient = wide = widened([*tensors, g], torch.float32)
    rates = ([float(cohort.group["lr"])],) if rule.takes_rates else ()
    rule.fused([p], [gradient], [[x] for x in states], cohort.t + 1, cohort.group, scale, *rates, *cohort.scalars)
    torch._foreach_copy_(tensors, wide[:-1])
    return p


def _follow(average: Tensor, p: Tensor, weight: float) -> None:
    if weight == 1:
        average.copy_(p)
        return
    wide = widened([average], torch.float32, "average")
    follow(wide, [p], weight)
    average.copy_(wide[0])
