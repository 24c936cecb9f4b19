"""One step: take the gradients by the plan, judge their norm, update bucket by bucket."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from . import capture, clipping, ema
from .arguments import check_rates
from .backends import KernelFailed
from .cohorts import StepNumbers
from .distributed import warn_of_replaced_parameters
from .executors import compile_ahead, judge_of, prefer_one_launch, problem_with_one_launch
from .groups import params_of
from .metrics import Metrics, Tracker
from .plan import Plan
from .planner import Planner, get_grad
from .refresh import Captured
from .settings import CLIP
from .upload import capturing


class Engine(Planner):
    """What ``step`` runs. Nothing is built before the first step, and all of it can be built again, so
    none of it is copied or pickled with the optimizer."""

    def __init__(self) -> None:
        super().__init__()
        self.judge = clipping.judge
        self.prefers_one_launch = False
        self.verdict = clipping.UNJUDGED
        self.scaling: clipping.Scaling | None = None
        """What a GradScaler of ours asks of the step that it calls."""
        self.captured: list[Captured] = []
        """What CUDA graphs go on using."""
        self.tracked: Tracker | None = None
        """The tracker of the latest step."""
        self.averaged = False
        """Whether the parameters hold their averages now."""
        self.released = False
        """Whether parameters are updated inside backward."""

    def step(self, optimizer: Any) -> None:
        if self.averaged:
            raise RuntimeError("step() inside `with optimizer.ema_parameters()`, where parameters hold their averages")
        check_rates(optimizer, optimizer.param_groups)
        if self.captured:
            self._leave_out_replays(optimizer)
        # With learning rates of 0 torch.distributed.checkpoint takes a first step, only to have states that it can load
        # into. It must neither begin nor move an average.
        averages = dict(optimizer._ema) if not self.began and ema.stand_still(optimizer) else None
        if not self.with_gradients(optimizer, self._run):
            self.verdict = clipping.Verdict(norm=0.0) if optimizer._settings.needs_norm else clipping.UNJUDGED
        self.tracked = self.tracker
        if self.tracker is not None:
            self.tracker.finish()
        if averages is not None and optimizer._ema:
            self.synchronize(optimizer)
            self.forget()
            optimizer._ema.clear()
            optimizer._ema.update(averages)
        if not self.began:
            self.began = True
            if not self.executors and not self.released:
                warn_of_replaced_parameters()

    def _leave_out_replays(self, optimizer: Any) -> None:
        """Take what replays of graphs have skipped as known, before a step that the host counts itself: no count of
        the host's has these steps. Waits for the device, so not while a graph is captured."""
        plan = self.plan
        if self.skips.unattended and plan is not None and plan.counted and not any(map(capturing, plan.devices)):
            self.hear(optimizer, wait=True)
            self.skips.leave_out()

    def clip(self, optimizer: Any, max_norm: float) -> Tensor:
        """Judge the gradients now, and leave it to the next step to clip them. Returns their norm."""

        def judge(optimizer: Any, grads: list[Tensor | None]) -> None:
            # Gradients that were added to since, the step left out, are judged anew.
            if self.deferred is not None and self.deferred.is_valid(grads):
                raise RuntimeError("clip_grad_norm_() was called twice for one step(): call it once, after backward()")
            terms = clipping.terms(optimizer, self.scaling)._replace(clip=(max_norm, *CLIP))
            self.verdict = self._judge(terms)
            self.skips.count_in(self.verdict, -1)
            self.deferred = clipping.Deferred(self.verdict, grads, self.scaling)

        if not self.with_gradients(optimizer, judge):
            self.verdict = clipping.Verdict(norm=0.0)
        elif self.plan.has_beginners(0):
            self.synchronize(optimizer)  # they begin anew at the step, which may have another learning rate
        return self.grad_norm()

    def will_unscale(self, optimizer: Any) -> bool:
        """Whether the next step divides by a loss scale, as ``clip`` was told."""
        if self.deferred is None or not self.deferred.scaled:
            return False
        return self.deferred.is_of(list(map(get_grad, params_of(optimizer))))

    def let_go(self) -> None:
        super().let_go()
        self.verdict = clipping.UNJUDGED

    def lend(self) -> None:
        if not self.captured:  # graphs go on writing where they did
            super().lend()

    def follow(self, optimizer: Any, plan: Plan) -> None:
        super().follow(optimizer, plan)
        self.judge, self.prefers_one_launch = judge_of(self.executors), prefer_one_launch(self.executors)

    def _run(self, optimizer: Any, grads: list[Tensor | None]) -> None:
        captures = self.plan.may_be_captured and capture.check(optimizer, self.plan)
        if captures:
            self.captured.append(Captured(self.plan, self.executors, copy.copy(optimizer._settings)))
        update = StepNumbers(optimizer)
        waiting = self._decide(optimizer, grads, update)
        joined_means, found = self.plan.joined_means, {}
        if joined_means is not None:
            # Also where this rank knows that the step is skipped: others may leave that to their devices, and wait for
            # its part.
            found = joined_means.means([] if self.verdict.skip else waiting, update, self.verdict, self.skips)
        if self.verdict.skip:
            self._update(waiting if self.tracker is not None else [], update, found)
            self.drop_unwritten(optimizer)
            return

        self._update(waiting, update, found)
        if self.plan.shards is not None:
            torch.autograd.graph.increment_version(self.plan.shards.params)
        self._count(optimizer, captures)

    def _update(self, executors: list[Any], update: StepNumbers, found: dict[int, Tensor]) -> None:
        for number, executor in enumerate(executors):
            try:
                executor.step(update, self.verdict, self.skips, found.get(id(executor)))
            except KernelFailed as failure:
                # Other parameters were updated, or the verdict has counted the step.
                failure.too_late = number > 0 or self.verdict is not clipping.UNJUDGED or bool(found)
                raise

    def _decide(self, optimizer: Any, grads: list[Tensor | None], update: StepNumbers) -> list[Any]:
        """Pass the verdict on this step's gradients. Returns the executors that are still to update: all, or none where
        one launch does both."""
        terms = clipping.terms(optimizer, self.scaling)
        is_deferred = self.deferred is not None and self.deferred.is_of(grads)
        verdict = None
        may_launch_once = self.prefers_one_launch or optimizer._settings.launches == 1
        if may_launch_once and self._takes_one_launch(optimizer, terms, is_deferred):
            verdict = self.executors[0].step_cooperatively(update, terms, self.skips)
        waiting = self.executors if verdict is None else []
        if waiting and not self.began:
            judged = self.deferred.verdict if is_deferred else None
            compile_ahead(waiting, update, judged, terms, self.skips, self.plan.reduction)
        if verdict is None and is_deferred:
            verdict = self._deferred_verdict(terms)
        elif verdict is None:
            verdict = clipping.UNJUDGED if terms is clipping.NONE else self._judge(terms)
        self.verdict, self.deferred = verdict, None
        if self.tracker is not None:
            self.verdict = self.verdict._replace(loss_scale=terms.loss_scale)
        if self.scaling is not None:
            device = self.executors[0].bucket.device if self.executors else self.plan.reduction.device
            self.scaling.found_inf = self.verdict.found_inf(device)
        return waiting

    def _count(self, optimizer: Any, captures: bool) -> None:
        """Count the step that was taken, as far as the host knows."""
        if self.verdict.tensor is not None and self.plan.scalars:
            # What the latest step makes of the scalars depends on whether the one before it was skipped.
            self.hear(optimizer, wait=True)
        self.plan.advance(optimizer, 1)
        for executor in self.executors:
            if executor.bucket.capturable:
                executor.advance(optimizer, self.verdict)
        if self.verdict.tensor is not None and self.plan.counted and not captures:
            if self.verdict.may_skip:
                self.skips.listen()
            # States must not begin at the learning rate of a first step that is skipped.
            self.hear(optimizer, wait=self.plan.has_beginners(1))
        elif self.verdict.may_skip:
            self.skips.unattended = True

    def _deferred_verdict(self, terms: clipping.Terms) -> clipping.Verdict:
        verdict = self.deferred.verdict_of_step(terms, self.scaling)
        if self.judge is clipping.judge:
            # The executors may have passed from our kernels to torch since.
            verdict = verdict.heard()
        self.skips.count_in(verdict)
        return verdict

    def _judge(self, terms: clipping.Terms) -> clipping.Verdict:
        if not terms.any:
            return clipping.UNJUDGED
        if terms.needs_norm:
            self.plan.reduction.check()
        return self.judge(self.executors, terms, self.skips, self.plan.reduction)

    def _takes_one_launch(self, optimizer: Any, terms: clipping.Terms, is_deferred: bool) -> bool:
        """Whether norm and update run as one launch. RuntimeError if that was asked for and cannot be."""
        launches = optimizer._settings.launches
        if launches == 2 or not self.executors:
            return False
        problem = problem_with_one_launch(optimizer, self.executors, terms, self.plan.reduction, is_deferred)
        if problem is not None and launches == 1:
            self.drop_unwritten(optimizer)
            raise RuntimeError(clipping.IMPOSSIBLE.format(problem))
        # Without a verdict the update is one launch by itself.
        return problem is None and terms.any

    def grad_norm(self) -> Tensor | None:
        return self.verdict.grad_norm(self._norm_dtype())

    def metrics(self, track: str) -> Metrics | None:
        return None if self.tracked is None else self.tracked.metrics(track)

    def _norm_dtype(self) -> torch.dtype:
        wide = any(executor.bucket.grad_dtype == torch.float64 for executor in self.executors)
        return torch.float64 if wide else torch.float32
