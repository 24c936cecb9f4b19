"""What a CUDA graph asks of a step: numbers that stay on the device, and memory that stays where it is.

A graph repeats launches with the addresses that they had when it was captured. So nothing may be built or compiled
then, and what the step of a graph used must outlive the plan that it belonged to.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import torch

from . import upload
from .hooks import warn
from .setting_checks import flag
from .settings import EpsSettings, Settings, setting

IMPAIRS = (
    "This instance was constructed with capturable=True or some of all the param_groups came with capturable=True, but "
    "step() is running without CUDA graph capture. If you never intend to graph-capture this instance, capturable=True "
    "can impair performance, and you should set capturable=False."
)
"""torch's words."""


@dataclasses.dataclass(kw_only=True)
class CapturableSettings(Settings):
    """For the classes that have no such argument in torch, or that torch lacks."""

    capturable: bool = setting(
        False,
        flag,
        """(bool): what it is for torch.optim.AdamW: step counts stay on the GPU, a learning rate given as a tensor
        there is read by the step itself, and a CUDA graph may hold the step.""",
    )


@dataclasses.dataclass(kw_only=True)
class CapturableEpsSettings(CapturableSettings, EpsSettings):
    """The same for a rule that divides by a root."""


def refuse_to_build(devices: Iterable[torch.device]) -> None:
    """RuntimeError if a graph is being captured, for a step that is not prepared."""
    if any(map(upload.capturing, devices)):
        raise RuntimeError(
            "the first step(), and the first with other gradients, states or settings than the step before, prepares "
            "tables, which a CUDA graph cannot hold: take a few steps like this one before capturing, on a side "
            "stream, as for every graph"
        )


def check(optimizer: Any, plan: Any) -> bool:
    """Whether this step goes into a graph.

    Raises:
        RuntimeError: as in torch, if a group is not capturable.
    """
    capturing = any(map(upload.capturing, plan.devices))
    if not capturing:
        _warn_as_torch_does(optimizer, plan)
        return False
    if plan.counted and "capturable" in optimizer.defaults:
        raise RuntimeError(
            f"Attempting CUDA graph capture of step() for an instance of {type(optimizer).__name__} but param_groups' "
            "capturable is False."
        )
    if len(plan.devices) > 1:
        raise RuntimeError("a CUDA graph can hold the step of parameters on one GPU only; make an optimizer for each")
    for bucket in plan.counted:
        changing = bucket.stored.draws or any(
            optimizer.update(c.group, c.t + 1, *c.scalars) != optimizer.update(c.group, c.t + 2, *c.scalars)
            for c in bucket.cohorts
        )
        if changing:
            raise RuntimeError(
                f"the step of {type(optimizer).__name__} with these options depends on the step count, which a CUDA "
                "graph would freeze: make the optimizer with capturable=True"
            )
    return True


def _warn_as_torch_does(optimizer: Any, plan: Any) -> None:
    warned = plan.counted or getattr(optimizer, "_warned_capturable_if_run_uncaptured", False)
    if not warned and "capturable" in optimizer.defaults and any(d.type == "cuda" for d in plan.devices):
        warn(IMPAIRS)
        optimizer._warned_capturable_if_run_uncaptured = True
