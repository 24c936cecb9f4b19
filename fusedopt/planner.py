"""The plan of an optimizer's steps, as long as it holds; where it does not, another one."""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from . import capture, clipping
from .backends import KernelFailed
from .executors import make_executor
from .groups import params_of
from .hooks import warn
from .metrics import Tracker
from .places import Place
from .plan import Plan, without_collection
from .roster import Roster
from .shards import any_distributed, local_grads
from .skips import Skips
from .torch_step import NotFusable, left_to_torch

get_grad = attrgetter("grad")


class Planner:
    """Finds the plan for the gradients of a step, and what runs it."""

    def __init__(self) -> None:
        self.places: dict[Tensor, Place] = {}
        self.plan: Plan | None = None
        self.roster: Roster | None = None
        self.unlisted: Plan | None = None
        """The latest plan, if it is not from the roster and not in it."""
        self.executors: list[Any] = []
        """One for each bucket of the plan."""
        self.tracker: Tracker | None = None
        """Keeps the norms of the plan's steps, where ``track`` is set."""
        self.distributed = False
        """Whether some parameters are distributed over ranks."""
        self.left: NotFusable | None = None
        """Why the latest step was torch's own."""
        self.skips = Skips()
        self.deferred: clipping.Deferred | None = None
        """What ``clip_grad_norm_`` left for the next step to do."""
        self.began = False
        """Whether a step was taken."""
        self.owes_zeros = False
        """Whether this step shall leave zeros in place of the gradients."""
        self.lent = False
        """Whether nothing here holds states, so that they live only as long as ``optimizer.state`` does."""
        self.stepping = False
        """Whether a step is under way, in which a rule may ask for ``optimizer.state``."""

    def with_gradients(self, optimizer: Any, act: Callable[[Any, list[Tensor | None]], None]) -> bool:
        """Do something with the gradients of this step, or return False if there are none."""
        if self.left is not None and self.left.lasts(optimizer):
            raise self.left.with_traceback(None)
        if self.lent:
            self.take_back(optimizer)
        self.stepping = True
        try:
            known = self.plan is not None and self.plan.knows(optimizer)
            params = self.plan.params if known else params_of(optimizer)
            grads = list(map(get_grad, params))
            parts = local_grads(params, grads) if self.distributed else grads
            if not known or not self.plan.holds(parts):
                if not self.distributed and any_distributed(params):
                    self.distributed = True
                    parts = local_grads(params, grads)
                if not self._select(optimizer, params, parts):
                    self._build(optimizer, parts)
            if not self.executors and not self.plan.reduction.communicates:
                return False
            try:
                for executor in self.executors:
                    executor.take(parts, self.plan.as_planned, self.owes_zeros)
            except RuntimeError:
                # Nothing was changed yet. A new plan looks at everything, and says what does not fit.
                self._build(optimizer, parts)
                raise
            act(optimizer, grads)
            return True
        except KernelFailed as failure:
            self._do_without_kernels(optimizer, failure)
        finally:
            self.stepping = False
            for executor in self.executors:
                executor.release()
        return self.with_gradients(optimizer, act)

    def _do_without_kernels(self, optimizer: Any, failure: KernelFailed) -> None:
        """Let torch take this step, in which nothing was changed yet, and all later ones on that device. The error is
        raised where kernels were asked for, where the rule is the user's, and where other ranks may have gone on."""
        own_rule = any(bucket.rule.kernel is not None for bucket in self.plan.buckets)
        others_wait = self.began and self.plan.reduction.communicates
        if optimizer.backend is not None or own_rule or others_wait or failure.too_late:
            raise failure.__cause__
        warn(
            f"{failure}: torch takes the steps on {failure.device} from now on; with backend='triton' this is an error"
        )
        optimizer._kernel_failures[failure.device] = str(failure)
        self.synchronize(optimizer)
        self.forget()

    @torch.inference_mode(False)  # states made in inference mode could not be written to outside it
    @torch.no_grad()  # which the line above switches off
    @without_collection()
    def _build(self, optimizer: Any, grads: list[Tensor | None]) -> None:
        devices = {p.device for p in params_of(optimizer)}
        # What waits to be clipped by our step would not be clipped by torch's.
        left = None if self.deferred is not None else left_to_torch(optimizer, devices)
        if left is None:
            capture.refuse_to_build(devices)
        self.synchronize(optimizer)
        self.let_go()
        if left is not None:
            raise left
        plan = Plan(optimizer, self.places, grads)
        self.follow(optimizer, plan)
        self.unlisted = plan
        if self.roster is not None and not self.roster.lists(plan):
            self.roster = None  # it would keep parameters that were taken out of the groups, and states in other forms

    @torch.inference_mode(False)
    @torch.no_grad()
    @without_collection()
    def _select(self, optimizer: Any, params: list[Tensor], grads: list[Tensor | None]) -> bool:
        """Put a plan together where all that changed is which of the known parameters have gradients."""
        earlier = self.plan
        if earlier is None or [g is not None for g in grads] == earlier.present:
            return False
        capture.refuse_to_build(earlier.devices)
        self.synchronize(optimizer)
        if self.plan is None:
            return False
        if self.unlisted is not None:
            self.roster, self.unlisted = Roster.of(optimizer, self.unlisted, self.roster), None
        plan = None if self.roster is None else self.roster.plan(optimizer, params, grads)
        if plan is not None:
            self.follow(optimizer, plan)
        return plan is not None

    def let_go(self) -> None:
        """Forget the plan, and what was found out about the gradients by it."""
        self.plan = self.tracker = None

    def follow(self, optimizer: Any, plan: Plan) -> None:
        """Make the executors that run the plan."""
        self.let_go()
        self.executors = [make_executor(bucket, optimizer._settings) for bucket in plan.buckets]
        tracks = optimizer._settings.track is not None
        self.tracker = Tracker(plan.params, self.executors, plan.reduction) if tracks else None
        plan.note_memory(self.executors)
        if plan.counted:
            self.skips.leave_out()
        self.plan, self.left = plan, None

    def lend(self) -> None:
        """Hold states no longer than ``optimizer.state`` does, until the next step."""
        plans = self._plans()
        if self.lent or self.stepping or not plans or not all(plan.lends for plan in plans):
            return
        self.lent = True
        for holder in (*plans, self.roster):
            if holder is not None:
                holder.lend()
        for place in self.places.values():
            place.lend()

    @torch.inference_mode(False)
    @torch.no_grad()
    def take_back(self, optimizer: Any) -> None:
        """Hold states again. Where one is elsewhere, planning begins anew."""
        self.lent = False
        there = [place.take_back(optimizer._states.get(p)) for p, place in self.places.items()]
        if not all(there):
            self.synchronize(optimizer)
            self.forget()
            return
        for plan in self._plans():
            plan.take_back(optimizer)
        if self.roster is not None:
            self.roster.take_back()

    def _plans(self) -> list[Plan]:
        """All that are kept."""
        plans = self.plan, self.unlisted, None if self.roster is None else self.roster.whole
        return list(dict.fromkeys(plan for plan in plans if plan is not None))

    def synchronize(self, optimizer: Any) -> None:
        """Wait for what the device has not told yet, so that ``optimizer.state`` is exact."""
        if self.plan is not None:
            self.hear(optimizer, wait=True)
        self.drop_unwritten(optimizer)

    def hear(self, optimizer: Any, wait: bool) -> None:
        """Take back the steps that turned out to be skipped."""
        skipped = self.skips.resolve(wait)
        if skipped:
            self.plan.advance(optimizer, -skipped)
            self.drop_unwritten(optimizer)

    def drop_unwritten(self, optimizer: Any) -> None:
        """Drop the states that no step has written yet, where that makes a difference, and the plan that has them."""
        if self.plan is not None and self.plan.drop_unwritten(optimizer):
            self.plan = None

    def forget(self) -> None:
        """Build a new plan at the next step."""
        self.plan = self.roster = self.unlisted = None

    def layout(self) -> str:
        if self.left is not None:
            return f"torch.optim's own step: {self.left}"
        if self.plan is None:
            return "nothing yet: the layout is decided at the first step"
        return "\n".join(map(str, self.plan.buckets)) or "no parameter had a gradient"
