"""What one step is asked to do, looked at before anything is changed.

Every complaint about parameters, gradients and states is made here, so that an error leaves all of them
as they were.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .backends import Backend, backend
from .rule import Rule


class NotFusable(Exception):
    """Some parameter needs torch's own step; the message names it and says why."""


def is_differentiable(group: dict[str, Any]) -> bool:
    return group.get("differentiable", False)


def survey(optimizer: Any, rules: list[Rule]) -> dict[tuple, list[tuple]]:
    """Every parameter with a gradient, by bucket. Changes nothing, so an error leaves all as it was."""
    buckets: dict[tuple, list[tuple]] = {}
    choices: dict[torch.device, Backend] = {}
    active = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    if len(set(active)) != len(active):
        raise NotFusable("a parameter that is listed twice")
    position = 0
    for number, (group, rule) in enumerate(zip(optimizer.param_groups, rules)):
        for p in group["params"]:
            g = p.grad
            position += 1
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
            dtypes = {key: _state_dtype(p, state.get(key), key, where) for key in rule.keys}
            taken = _steps_taken(optimizer, rule, state, where)
            if p.device not in choices:
                choices[p.device] = backend(p.device, optimizer.backend)
            choice = choices[p.device]
            key = (p.device, p.dtype, g.dtype, rule, choice, tuple(dtypes.values()))
            buckets.setdefault(key, []).append((p, position - 1, number, group, taken, dtypes))
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


def _state_dtype(p: Tensor, value: Any, key: str, where: str) -> torch.dtype:
    if value is None:
        return p.dtype
    if not isinstance(value, Tensor):
        raise RuntimeError(f"the state {key!r} of {where} must be a tensor, got {type(value).__name__}")
    if value.shape != p.shape:
        raise RuntimeError(f"the state {key!r} of {where} has shape {tuple(value.shape)}")
    if value.device != p.device:
        raise RuntimeError(
            f"the state {key!r} of {where} is on {value.device}, the parameter on {p.device}; "
            "move the model before the first step, or load the state_dict again after moving it"
        )
    return value.dtype


def _steps_taken(optimizer: Any, rule: Rule, state: dict[str, Any], where: str) -> int:
    if not optimizer.counts_steps:
        # Only whether the buffers were ever written matters.
        return int(all(state.get(key) is not None for key in rule.keys)) if rule.keys else 0
    step = state.get("step", 0)
    try:
        return int(step)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise RuntimeError(f"the state 'step' of {where} must be a number, got {step!r}") from error
