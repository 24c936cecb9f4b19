"""One step: check the plan, take the gradients, judge their norm, update bucket by bucket."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import clipping, torch_backend, torch_forms
from .plan import Bucket, Cohort, Place, Plan
from .rule import Update
from .settings import Settings


class Engine:
    """What ``step`` runs. Nothing is built before the first step, and all of it can be built again, so
    none of it is copied or pickled with the optimizer."""

    def __init__(self) -> None:
        self.places: dict[Tensor, Place] = {}
        self.plan: Plan | None = None
        self.executors: list[Any] = []
        self.verdict = clipping.UNJUDGED
        self.skips = clipping.Skips()
        self.scaling: clipping.Scaling | None = None
        """What a GradScaler of ours asks of the step that it calls."""

    def step(self, optimizer: Any) -> None:
        params = [p for group in optimizer.param_groups for p in group["params"]]
        grads = [p.grad for p in params]
        if self.plan is None or not self.plan.holds(optimizer, params, grads):
            self._build(optimizer)
        if not self.executors:
            self.verdict = clipping.Verdict(norm=0.0) if optimizer._settings.needs_norm else clipping.UNJUDGED
            return
        try:
            try:
                for executor in self.executors:
                    executor.take(grads)
            except RuntimeError:
                # Nothing was changed yet. A new plan looks at everything, and says what does not fit.
                self._build(optimizer)
                raise
            self._run(optimizer)
        finally:
            for executor in self.executors:
                executor.release()

    def _build(self, optimizer: Any) -> None:
        self.settle(optimizer)
        self.plan, self.verdict = None, clipping.UNJUDGED
        plan = Plan(optimizer, self.places)
        self.executors = [_executor(bucket, optimizer._settings) for bucket in plan.buckets]
        self.plan = plan

    def _run(self, optimizer: Any) -> None:
        self.verdict = clipping.judge(self.executors, clipping.terms(optimizer, self.scaling), self.skips)
        if self.scaling is not None:
            self.scaling.found_inf = self.verdict.found_inf(self.executors[0].bucket.device)
        if self.verdict.skip:
            self._drop_unwritten(optimizer)
            return

        def update(cohort: Cohort, skipped: int = 0) -> Update:
            """The numbers of this step, if ``skipped`` more steps were skipped than the host knows."""
            return optimizer.update(cohort.group, cohort.t + 1 - skipped)

        for executor in self.executors:
            executor.step(update, self.verdict, self.skips)
        self.plan.advance(1)
        if self.verdict.device is not None:
            self.skips.listen()
            self._hear(optimizer, wait=False)

    def settle(self, optimizer: Any) -> None:
        """Wait for what the device has not told yet, so that ``optimizer.state`` is exact."""
        if self.plan is not None:
            self._hear(optimizer, wait=True)

    def _hear(self, optimizer: Any, wait: bool) -> None:
        """Take back the steps that turned out to be skipped."""
        skipped = self.skips.resolve(wait)
        if skipped:
            self.plan.advance(-skipped)
            self._drop_unwritten(optimizer)

    def _drop_unwritten(self, optimizer: Any) -> None:
        """A momentum buffer exists only once it was written: its absence means the first step."""
        if optimizer.counts_steps:
            return
        for bucket in self.plan.buckets:
            for member in bucket.members:
                if bucket.cohorts[member.cohort].t == 0:
                    for key in bucket.stored.state_keys:
                        optimizer.state[member.param].pop(key, None)
        self.plan = None

    def forget(self) -> None:
        """Build a new plan at the next step."""
        self.plan = None

    def grad_norm(self) -> Tensor | None:
        if self.verdict.norm is None:
            return None
        if self.verdict.device is not None:
            return self.verdict.device[0].to(self._norm_dtype(), copy=True)
        return torch.tensor(self.verdict.norm, dtype=self._norm_dtype())

    def _norm_dtype(self) -> torch.dtype:
        wide = any(executor.bucket.grad_dtype == torch.float64 for executor in self.executors)
        return torch.float64 if wide else torch.float32

    def skipped_steps(self) -> Tensor:
        return self.skips.total()

    def layout(self) -> str:
        if self.plan is None:
            return "nothing yet: the layout is decided at the first step"
        return "\n".join(_describe(bucket) for bucket in self.plan.buckets) or "no parameter had a gradient"


def _executor(bucket: Bucket, settings: Settings) -> Any:
    if bucket.backend.name == "torch":
        executor = torch_backend.Executor if bucket.stored.plain else torch_forms.Executor
        return executor(bucket, settings)
    from . import triton_backend

    return triton_backend.Executor(bucket, settings)


def _describe(bucket: Bucket) -> str:
    members = bucket.members
    flattened = sum(m.place.flattened is not None for m in members)
    gathered = sum(m.place.packed for m in members)
    elements = sum(m.param.numel() for m in members)
    placement = f"{flattened} flattened, {gathered} gathered" if flattened or gathered else "left in place"
    return (
        f"{bucket.rule.name} on {bucket.device}, {str(bucket.dtype).removeprefix('torch.')}: {len(members)} parameters "
        f"({elements} elements, {placement}) in {len(bucket.cohorts)} row(s), "
        f"backend {bucket.backend} ({bucket.backend.reason})"
    )
