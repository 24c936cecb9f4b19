"""The global gradient norm, and what follows from it: the clip factor, or a skipped step."""

from __future__ import annotations

import dataclasses
import math
import weakref
from collections.abc import Callable, Sequence
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .distributed import Reduction
from .skips import Skips

IMPOSSIBLE = "launches=1 is not possible here: {}; use launches='auto' or 2"


class Verdict(NamedTuple):
    """What one step does with its gradients. Either the host knows it, or a device does, and nobody waits for it: then
    ``tensor`` is float64 [norm, factor, skip, skipped steps so far] there, and ``factor`` and ``skip`` are at their
    defaults. ``norm`` is None where no setting needs one, and NaN where only the device knows it."""

    norm: float | None = None
    factor: float = 1.0
    skip: bool = False
    tensor: Tensor | None = None
    loss_scale: Tensor | None = None
    """What the gradients are still multiplied by, where somebody wants their norms."""
    may_skip: bool = False
    """Whether the device may decide to skip the step, of which the host has to hear."""

    def grad_norm(self, dtype: torch.dtype) -> Tensor | None:
        """The norm as a new tensor, where it is known."""
        if self.norm is None:
            return None
        if self.tensor is not None:
            return self.tensor[0].to(dtype, copy=True)
        return torch.tensor(self.norm, dtype=dtype, device="cpu")

    def found_inf(self, device: torch.device) -> Tensor:
        """Whether the step is skipped, as GradScaler.update() takes it: a new float32 scalar."""
        if self.tensor is not None:
            return self.tensor[2].to(device, torch.float32, copy=True)
        return torch.full((), float(self.skip), dtype=torch.float32, device=device)

    def or_skip(self, found_inf: Tensor) -> Verdict:
        """The same, but skipping the step also if ``found_inf`` is not 0."""
        if self.tensor is None:
            return self._replace(skip=self.skip or found_inf.item() != 0)
        skip = self.tensor[2]
        skip.copy_(skip.logical_or(found_inf.to(skip.device)))
        return self._replace(may_skip=True)

    def heard(self) -> Verdict:
        """The same where the host knows it, which for a verdict of a device it waits for."""
        if self.tensor is None:
            return self
        norm, factor, skip, _ = self.tensor.tolist()
        return Verdict(None if self.norm is None else norm, factor, skip != 0, loss_scale=self.loss_scale)

    def on(self, device: torch.device) -> Tensor | None:
        """The verdict for kernels on ``device``; None if there is nothing to multiply or skip."""
        if self.tensor is not None or (self.factor == 1 and not self.skip):
            return self.tensor
        numbers = [self.norm or 0.0, self.factor, float(self.skip), 0.0]
        return torch.tensor(numbers, dtype=torch.float64, device="cpu").to(device)


UNJUDGED = Verdict()


@dataclasses.dataclass
class Scaling:
    """What a ``fusedopt.GradScaler`` asks of the next step."""

    loss_scale: Tensor | None
    """What the gradients are still multiplied by; None if they were unscaled already."""
    found_inf: Tensor | None
    """Whether one of them is not finite; None if nobody has looked yet, and the step shall."""
    unscale: Callable[[], Tensor]
    """Unscales them in a pass of its own, for steps that are not ours; returns ``found_inf``."""


class Terms(NamedTuple):
    """What the gradients of one step are judged by."""

    clip: tuple[float, float, float] | None = None
    """S, epsilon and the largest factor of g <- g min(largest, S / (norm + epsilon))."""
    skip_nonfinite: bool = False
    loss_scale: Tensor | None = None
    found_inf: Tensor | None = None
    """Skip this step if it is not 0."""

    @property
    def needs_norm(self) -> bool:
        return self.clip is not None or self.skip_nonfinite

    def left_to(self, tensor: Tensor) -> Verdict:
        """The verdict that a device passes by these terms, and keeps in ``tensor``."""
        may_skip = self.skip_nonfinite or self.found_inf is not None
        return Verdict(norm=math.nan if self.needs_norm else None, tensor=tensor, may_skip=may_skip)

    @property
    def joins_ranks(self) -> bool:
        """Whether what one rank's gradients look like concerns the others."""
        return self.needs_norm or self.found_inf is not None

    @property
    def any(self) -> bool:
        return self.needs_norm or self.loss_scale is not None or self.found_inf is not None


NONE = Terms()
"""The terms of a step that takes its gradients as they are."""


def terms(optimizer: Any, scaling: Scaling | None) -> Terms:
    """The settings of an optimizer, and what a scaler asks of it: ours through ``scaling``, torch's through
    attributes, as it does where an optimizer was made with ``fused=True``."""
    settings = optimizer._settings
    if scaling is not None:
        looks = settings.skip_nonfinite or scaling.found_inf is None
        return Terms(settings.clip, looks, scaling.loss_scale, scaling.found_inf)
    given = vars(optimizer)
    loss_scale, found_inf = given.get("grad_scale"), given.get("found_inf")
    if loss_scale is None and found_inf is None and not settings.needs_norm:
        return NONE
    return Terms(settings.clip, settings.skip_nonfinite, loss_scale, found_inf)


class Deferred:
    """A verdict on gradients that wait, unclipped, for the step that will apply it."""

    def __init__(self, verdict: Verdict, grads: Sequence[Tensor | None], scaling: Scaling | None):
        self.verdict = verdict
        self.scaled = scaling is not None
        """Whether the verdict includes the division by a loss scale."""
        # No strong references: gradients that are dropped before the step must not live on.
        self.grads = [None if g is None else weakref.ref(g) for g in grads]
        self.versions = [None if g is None else g._version for g in grads]

    def is_of(self, grads: Sequence[Tensor | None]) -> bool:
        """Whether these are the gradients that were judged; False if none of them is.

        Raises:
            RuntimeError: if some of them are, or if they were written to since.
        """
        same = [g is not None and ref is not None and ref() is g for g, ref in zip(grads, self.grads)]
        present = [g is not None for g in grads]
        if not any(same):
            # A rank without gradients has shared in the verdict of the others.
            return not any(present) and not any(self.grads)
        if not self.is_valid(grads):
            raise RuntimeError(
                "gradients were changed between clip_grad_norm_() and step(), which was to clip them: call "
                "clip_grad_norm_() last, or zero_grad() to drop both"
            )
        return True

    def is_valid(self, grads: Sequence[Tensor | None]) -> bool:
        """Whether these are the gradients that were judged, as they were then."""
        judged = [None if ref is None else ref() for ref in self.grads]
        versions = [None if g is None else g._version for g in grads]
        return len(grads) == len(judged) and all(map(is_, grads, judged)) and versions == self.versions

    def verdict_of_step(self, terms: Terms, scaling: Scaling | None) -> Verdict:
        """What the step that now applies it, and has these terms of its own, does with the gradients.

        Raises:
            RuntimeError: if the terms contradict what was judged.
        """
        if terms.clip is not None:
            raise RuntimeError(f"max_grad_norm={terms.clip[0]} was set between clip_grad_norm_() and step()")
        if terms.loss_scale is not None and not self.scaled:
            raise RuntimeError(
                "clip_grad_norm_() was given gradients that are still multiplied by the loss scale: call "
                "fusedopt.GradScaler's clip_grad_norm_(optimizer, max_norm) instead, or unscale_(optimizer) before it"
            )
        if self.scaled and scaling is None:
            raise RuntimeError("the gradients are still multiplied by the loss scale: call scaler.step(optimizer)")
        return self.verdict if terms.found_inf is None else self.verdict.or_skip(terms.found_inf)


def judge(executors: Sequence[Any], terms: Terms, skips: Skips, reduction: Reduction) -> Verdict:
    """Judge this step's gradients on the host: norm (if a term needs it), unscaling, clip factor, skipping.

    Args:
        executors: one per bucket, each holding its gradients.
        terms: what to judge them by.
        skips: where a skipped step is counted.
        reduction: what makes the norm over this rank's gradients one over all.
    """
    scale = 1.0 if terms.loss_scale is None else terms.loss_scale.item()
    norm, skip = _norm_and_found_inf(executors, terms, reduction)
    factor = 1 / scale
    if norm is not None:
        norm /= scale
        skip = skip or (terms.skip_nonfinite and not math.isfinite(norm))
    if terms.clip is not None:
        target, epsilon, largest = terms.clip
        coefficient = target / (norm + epsilon)
        # Written so that a NaN norm gives a NaN factor, as in torch.
        factor *= largest if coefficient > largest else coefficient
    skips.count += skip
    return Verdict(norm, factor, skip)


def _norm_and_found_inf(executors: Sequence[Any], terms: Terms, reduction: Reduction) -> tuple[float | None, bool]:
    """The norm over all ranks, None if no term needs it, and whether a scaler has found an inf on any of them."""
    norms = [executor.norm() for executor in executors] if terms.needs_norm else []
    if not (reduction.communicates and terms.joins_ranks):
        found = terms.found_inf is not None and terms.found_inf.item() != 0
        return (hypot(norms) if terms.needs_norm else None), found
    squares = [0.0] * len(reduction.keys)
    for executor, norm in zip(executors, norms):
        # Not norm**2, which raises where the square overflows. Only float64 gradients beyond 1e154 make it do so.
        squares[reduction.keys.index(executor.bucket.spread)] += norm * norm
    local = torch.tensor(squares, dtype=torch.float64, device=reduction.device)
    total, found = reduction.total(local, terms.found_inf).tolist()
    return (math.sqrt(total) if terms.needs_norm else None), found != 0


def hypot(norms: Sequence[float]) -> float:
    """The norm of norms. NaN wins over inf, unlike in math.hypot: clipped by NaN, nothing looks healthy."""
    return math.nan if any(map(math.isnan, norms)) else math.hypot(*norms)
