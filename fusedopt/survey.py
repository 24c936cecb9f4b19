"""The checks before a step is planned, and which parameters one kernel can update together.

Every complaint about parameters, gradients and states is made here, before anything is changed, so that an error leaves
all of them as they were.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import _get_scalar_dtype

from . import means
from .backends import Backend, backend_of
from .cohorts import Scalar
from .distributed import ProcessGroups, Reduction
from .groups import params_of
from .places import Place, adoption_key, is_shared
from .rule import Rule
from .shards import distributed_alike, first_element, is_piece, local
from .storage import Storage, quantization_problem, storage, traits
from .torch_step import COMPLEX, PLAIN_TENSORS, REMEDIES, NotFusable, reason_against
from .units import refuse_shards


class Where(NamedTuple):
    """Which parameter an error is about."""

    position: int
    group: int
    owner: Tensor

    def __str__(self) -> str:
        return f"parameter {self.position} (group {self.group}, shape {tuple(self.owner.shape)})"


class Key(NamedTuple):
    """What the parameters of a bucket have in common."""

    device: torch.device
    dtype: torch.dtype
    grad_dtype: torch.dtype
    rule: Rule
    backend: Backend
    stored: Storage
    spread: ProcessGroups | None
    """The process groups over which DTensors are spread; None for other tensors."""
    capturable: bool
    scalar_dtypes: tuple[torch.dtype, ...]


class Entry(NamedTuple):
    """One parameter with a gradient, before it has its place in a bucket."""

    owner: Tensor
    """The parameter as the optimizer holds it, the key of its state."""
    param: Tensor
    """What this rank updates: the owner, or its local part."""
    position: int
    group_number: int
    group: dict[str, Any]
    taken: int | Tensor
    """Steps taken: what the state holds, if the device counts."""
    scalars: tuple[Scalar, ...]
    """What its rule keeps beside that count."""
    first_draw: int
    """See buckets.Member."""
    state: dict[str, Any]
    place: Place | None
    """Where its state was put before."""
    settled: bool
    """Whether it still lies there."""


def survey(
    optimizer: Any,
    rules: list[Rule],
    grads: list[Tensor | None],
    reduction: Reduction,
    places: dict[Tensor, Place],
) -> dict[Key, list[Entry]]:
    """Every parameter with a gradient, by bucket. Changes nothing, so an error leaves all as it was."""
    buckets: dict[Key, list[Entry]] = {}
    choices: dict[torch.device, Backend] = {}
    active = [p for p in params_of(optimizer) if p.grad is not None]
    if len(set(map(id, active))) != len(active):
        raise NotFusable("a parameter that is listed twice", "list it once")
    adaptive, states = optimizer._settings.adaptive_grad_clip is not None, optimizer._states
    position, eights = -1, optimizer._first_draw
    for number, (group, rule) in enumerate(zip(optimizer.param_groups, rules)):
        capturable = optimizer.is_capturable(group)
        adoption = adoption_key(rule, optimizer._settings, capturable)
        read = _number_on_device if capturable else _number
        # Most parameters of a group are of one kind: what concerns the kind is looked at once.
        kinds: dict[tuple, tuple[Storage, tuple[Scalar, ...], list[Entry]]] = {}
        for owner in group["params"]:
            position += 1
            p, g = local(owner), grads[position]
            first_draw, eights = eights, eights - (-owner.numel() // 8)
            if g is None:
                continue
            where = Where(position, number, owner)
            state, place = states.get(owner, {}), places.get(owner)
            spread = None if p is owner else reduction.spread(owner)
            piece = is_piece(owner)
            kind = type(p), p.device, type(g), g.device, g.dtype, g.layout, spread, piece, *traits(owner, rule, state)
            if kind not in kinds:
                _check_kind(p, g, group, where)
            if g.shape != p.shape:
                raise RuntimeError(f"the gradient of {where} has shape {tuple(g.shape)}")
            if adaptive and (spread or piece):
                refuse_shards(owner, where)
            settled = place is not None and place.is_settled(p, state, adoption)
            if state and not settled:
                _check_state(owner, rule, state, where)
            if kind not in kinds:
                stored = storage(owner, rule, optimizer._settings, state)
                if p.device not in choices:
                    choices[p.device] = backend_of(optimizer, p.device)
                if capturable and choices[p.device].name == "torch":
                    _refuse_capture(group, choices[p.device], where)
                if piece:
                    _refuse_means(optimizer, group, where)
                scalars = _scalars(optimizer, rule, group, state, read, where)
                dtypes = tuple(scalar.dtype for scalar in scalars)
                key = Key(p.device, p.dtype, g.dtype, rule, choices[p.device], stored, spread, capturable, dtypes)
                kinds[kind] = stored, scalars, buckets.setdefault(key, [])
            stored, scalars, entries = kinds[kind]
            if stored.draws and p is not owner:
                first_draw += first_element(owner) // 8
            taken = 0
            if state:
                taken = _steps_taken(optimizer, rule, stored, state, read, where)
                scalars = _scalars(optimizer, rule, group, state, read, where) if rule.scalars else ()
            entries.append(Entry(owner, p, position, number, group, taken, scalars, first_draw, state, place, settled))
    return buckets


def _check_kind(p: Tensor, g: Tensor, group: dict[str, Any], where: Where) -> None:
    """Refuse types, devices and dtypes of parameter and gradient that no fused step can take."""
    if reason := reason_against(p, g, group):
        left = NotFusable(f"{reason} ({where})", REMEDIES.get(reason, PLAIN_TENSORS))
        left.complex_param = where.owner if reason == COMPLEX else None
        raise left
    if g.device != p.device:
        raise RuntimeError(f"the gradient of {where} is on {g.device}, the parameter on {p.device}")


def _refuse_capture(group: dict[str, Any], choice: Backend, where: Where) -> None:
    if "capturable" in group:
        raise NotFusable(f"capturable=True without our kernels ({where})")
    raise RuntimeError(
        f"capturable=True keeps the step count on a GPU, and the backend of {where} is torch ({choice.reason}); "
        "leave it out"
    )


def _refuse_means(optimizer: Any, group: dict[str, Any], where: Where) -> None:
    if needy := [stage.name for stage in means.stages_of(optimizer.first_update(group))]:
        raise RuntimeError(
            f"{' and '.join(needy)} of {type(optimizer).__name__} needs a mean over each whole parameter, and {where} "
            "is a piece of FullyShardedDataParallel's flat parameter, which does not say what of it other ranks hold; "
            "use fully_shard (FSDP2), or leave it out"
        )


def _check_state(owner: Tensor, rule: Rule, state: dict[str, Any], where: Where) -> None:
    p = local(owner)
    if is_shared(state.get("step")):
        raise NotFusable(
            f"a step count that processes share, which each of them moves on ({where})", "give each process its own"
        )
    for key in rule.keys:
        value = state.get(key)
        if value is None:
            continue
        if not isinstance(value, Tensor):
            raise RuntimeError(f"the state {key!r} of {where} must be a tensor, got {type(value).__name__}")
        if not distributed_alike(owner, value):
            raise RuntimeError(
                f"the state {key!r} of {where} must be distributed as the parameter is; load states of distributed "
                "parameters with torch.distributed.checkpoint.state_dict.set_optimizer_state_dict"
            )
        value = local(value)
        if value.layout is not torch.strided:
            raise RuntimeError(f"the state {key!r} of {where} is sparse, its gradient is not")
        if value.shape != p.shape:
            raise RuntimeError(f"the state {key!r} of {where} has shape {tuple(value.shape)}")
        if value.device != p.device:
            raise RuntimeError(
                f"the state {key!r} of {where} is on {value.device}, the parameter on {p.device}; "
                "move the model before the first step, or load the state_dict again after moving it"
            )
        if problem := quantization_problem(rule, key, value, state.get(f"{key}_scale")):
            raise RuntimeError(f"{problem} ({where})")


def _steps_taken(
    optimizer: Any, rule: Rule, stored: Storage, state: dict[str, Any], read: Callable, where: Where
) -> int | Tensor:
    if not optimizer.counts_steps:
        # Only whether the buffers were ever written matters, except for random bits.
        written = all(state.get(key) is not None for key in rule.keys)
        if not written or not stored.draws or "step" not in state:
            return int(written and bool(rule.keys))
    return read(int, "step", state.get("step", 0), where)


def _scalars(
    optimizer: Any, rule: Rule, group: dict[str, Any], state: dict[str, Any], read: Callable, where: Where
) -> tuple[Scalar, ...]:
    """The rule's scalars, in the dtype that they have, or as they begin."""
    found = []
    for key in rule.scalars:
        value = state.get(key)
        if value is None:
            value = optimizer.initial_value(group, key)
        number = read(float, key, value, where)
        if isinstance(value, Tensor) and value.is_floating_point():
            found.append(Scalar(number, value.dtype))
        else:
            found.append(Scalar.rounded(number, _get_scalar_dtype()))
    return tuple(found)


def _number_on_device(kind: type, key: str, value: Any, where: Where) -> Any:
    """The number as a tensor, if it is one: to read it would mean to wait for its device."""
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex():
        return value.detach().reshape(())
    return _number(kind, key, value, where)


def _number(kind: type, key: str, value: Any, where: Where) -> Any:
    try:
        return kind(value)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise RuntimeError(f"the state {key!r} of {where} must be a number, got {value!r}") from error
