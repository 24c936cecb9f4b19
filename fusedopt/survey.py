"""What one step is asked to do, looked at before anything is changed.

Every complaint about parameters, gradients and states is made here, so that an error leaves all of them
as they were.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .backends import Backend, backend
from .rule import Rule
from .storage import Storage, quantization_problem, storage


class Entry(NamedTuple):
    """One parameter with a gradient."""

    param: Tensor
    position: int
    """Among all parameters."""
    number: int
    """Of its group."""
    group: dict[str, Any]
    taken: int
    """Steps."""
    first_draw: int
    """See plan.Member."""


class NotFusable(Exception):
    """Some parameter needs torch's own step; the message names it and says why."""


def is_differentiable(group: dict[str, Any]) -> bool:
    return group.get("differentiable", False)


def survey(optimizer: Any, rules: list[Rule]) -> dict[tuple, list[Entry]]:
    """Every parameter with a gradient, by bucket. Changes nothing, so an error leaves all as it was."""
    buckets: dict[tuple, list[Entry]] = {}
    choices: dict[torch.device, Backend] = {}
    active = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    if len(set(active)) != len(active):
        raise NotFusable("a parameter that is listed twice")
    position = eights = 0
    for number, (group, rule) in enumerate(zip(optimizer.param_groups, rules)):
        for p in group["params"]:
            g = p.grad
            position += 1
            first_draw, eights = eights, eights - (-p.numel() // 8)
            if g is None:
                continue
            where = f"parameter {position - 1} (group {number}, shape {tuple(p.shape)})"
            if reason := _not_fusable(p, g, group):
                raise NotFusable(f"{reason} ({where})")
            if g.device != p.device:
                raise RuntimeError(f"the gradient of {where} is on {g.device}, the parameter on {p.device}")
            if g.shape != p.shape:
                raise RuntimeError(f"the gradient of {where} has shape {tuple(g.shape)}")
            max_norm = optimizer._settings.max_grad_norm
            if max_norm is not None and getattr(p, "_fsdp_flattened", False):
                raise RuntimeError(
                    f"max_grad_norm={max_norm} would clip by this rank's part of the norm: {where} is a shard of "
                    "FullyShardedDataParallel; leave it away and call model.clip_grad_norm_() before step()"
                )
            state = optimizer.state.get(p, {})
            _look_at_state(p, rule, state, where)
            stored = storage(p, rule, optimizer._settings, state)
            taken = _steps_taken(optimizer, rule, stored, state, where)
            if p.device not in choices:
                choices[p.device] = backend(p.device, optimizer.backend)
            choice = choices[p.device]
            key = (p.device, p.dtype, g.dtype, rule, choice, stored)
            buckets.setdefault(key, []).append(Entry(p, position - 1, number, group, taken, first_draw))
    return buckets


def _not_fusable(p: Tensor, g: Tensor, group: dict[str, Any]) -> str | None:
    if is_differentiable(group):
        return "differentiable=True"
    if group.get("capturable"):
        return "capturable=True"
    if g.layout is not torch.strided:
        return "a sparse gradient"
    if p.is_complex():
        return "a complex parameter"
    if p.is_meta:
        return "a parameter on the meta device"
    if not p.is_floating_point() or not g.is_floating_point():
        return f"a parameter of dtype {p.dtype}"
    if type(p) not in (Tensor, torch.nn.Parameter) or type(g) is not Tensor:
        return f"a tensor subclass ({type(p).__name__} with a gradient of {type(g).__name__})"
    return None


def _look_at_state(p: Tensor, rule: Rule, state: dict[str, Any], where: str) -> None:
    for key in rule.keys:
        value = state.get(key)
        if value is None:
            continue
        if not isinstance(value, Tensor):
            raise RuntimeError(f"the state {key!r} of {where} must be a tensor, got {type(value).__name__}")
        if value.shape != p.shape:
            raise RuntimeError(f"the state {key!r} of {where} has shape {tuple(value.shape)}")
        if value.device != p.device:
            raise RuntimeError(
                f"the state {key!r} of {where} is on {value.device}, the parameter on {p.device}; "
                "move the model before the first step, or load the state_dict again after moving it"
            )
        if problem := quantization_problem(key, value, state.get(f"{key}_scale")):
            raise RuntimeError(f"{problem} ({where})")


def _steps_taken(optimizer: Any, rule: Rule, stored: Storage, state: dict[str, Any], where: str) -> int:
    if not optimizer.counts_steps:
        # Only whether the buffers were ever written matters, except for random bits.
        written = all(state.get(key) is not None for key in rule.keys)
        if not written or not stored.draws or "step" not in state:
            return int(written and bool(rule.keys))
    step = state.get("step", 0)
    try:
        return int(step)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise RuntimeError(f"the state 'step' of {where} must be a number, got {step!r}") from error
