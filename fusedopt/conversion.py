"""Checkpoints of states and parameters that are stored in forms of their own.

``state_dict()`` shows them as float32, which torch.optim and every other setting can load, and the exact values of
16-bit parameters as "master"; ``state_dict(compact=True)`` as they are. Loading takes both, from any setting.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import _get_scalar_dtype

from .encodings import converted, decode, decode_master, encode, encode_master, found, is_rounded
from .flat import strides_of_state
from .forms import Form, wide
from .rule import Rule
from .shards import distributed_alike, gather_anew, is_distributed, kind, like, local
from .storage import MASTER_KEYS, Storage, part_key, storage

MASTER = "master"


def state_dict(optimizer: Any, compact: bool, state_dict_of_torch: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What ``optimizer.state_dict`` returns."""
    if compact:
        refuse_distributed(optimizer)
        return state_dict_of_torch()
    if optimizer.master is None and optimizer.state_dtype is None and not _stores(optimizer):
        return state_dict_of_torch()
    # First among the hooks: those of users see the result.
    handle = optimizer.register_state_dict_post_hook(expand, prepend=True)
    try:
        return state_dict_of_torch()
    finally:
        handle.remove()


def _stores(optimizer: Any) -> bool:
    """Whether states still are in forms of their own: until the next step, where the settings have changed."""
    entries = ((optimizer.rule(group), optimizer._states.get(p)) for _, group, p in numbered(optimizer))
    return any(entry and _is_stored(rule.keys, entry) for rule, entry in entries)


def expand(optimizer: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
    """The state_dict with plain numbers in it. A hook: it runs before those of users."""
    states = dict(state_dict["state"])
    for group, packed in zip(optimizer.param_groups, state_dict["param_groups"]):
        for p, key in zip(group["params"], packed["params"]):
            if states.get(key):
                states[key] = _expanded(optimizer, group, p, states[key])
    return {**state_dict, "state": states}


def _expanded(optimizer: Any, group: dict[str, Any], p: Tensor, entry: dict[str, Any]) -> dict[str, Any]:
    here = {key: local(value) for key, value in entry.items()}
    shown = dict(entry)
    for role in optimizer.rule(group).keys:
        there = found(role, here, local(p))
        if there is None:
            continue
        form, parts = there
        if not form.plain or (optimizer.state_dtype is not None and parts[0].dtype.itemsize < 4):
            shown[role] = like(p, decode(form, parts, torch.float32))
        for part in form.parts[1:]:
            del shown[part_key(role, part)]
    master = found("", here, local(p))
    if master is not None:
        form, parts = master
        for part in form.parts[1:]:
            del shown[part_key("", part)]
        shown[MASTER] = like(p, decode_master(form, parts))
    return shown


def refuse_distributed(optimizer: Any) -> None:
    for p, entry in optimizer._states.items():
        if is_distributed(p) and any(key.endswith("_scale") for key in entry):
            raise RuntimeError(
                "the scales of 8-bit states of distributed parameters belong to this rank's part, and no checkpoint "
                "could put them together: use state_dict() without compact=True"
            )


class Held:
    """A tensor on its way through torch's ``load_state_dict``, which would cast it to the parameter's dtype."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor


def hold(optimizer: Any, state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The state_dict with its states in the forms that the optimizer's have, held. A hook: it runs after all others,
    and changes neither the optimizer nor its argument."""
    states = dict(state_dict["state"])
    for group, packed in zip(optimizer.param_groups, state_dict["param_groups"]):
        for p, key in zip(group["params"], packed["params"]):
            if states.get(key) and not p.is_meta:
                states[key] = _held(optimizer, optimizer.rule({**group, **packed}), p, states[key])
    return {**state_dict, "state": states}


def _held(optimizer: Any, rule: Rule, p: Tensor, entry: dict[str, Any]) -> dict[str, Any]:
    part = local(p)
    stored = storage(p, rule, optimizer._settings, optimizer._states.get(p, {}))
    numbers = [key for key in rule.scalars if isinstance(entry.get(key), Tensor)]
    if numbers:
        entry = {**entry, **{key: Held(entry[key].detach().to("cpu", copy=True)) for key in numbers}}
    if stored.plain and stored.dtypes == {p.dtype} and not _is_stored(rule.keys, entry):
        return entry  # the tensors as in torch
    here = {key: local(x).to(part.device) if isinstance(x, Tensor) else x for key, x in entry.items()}
    kept, held = dict(entry), {}
    for role, form in stored.kept:
        if not isinstance(here.get(role), Tensor):
            continue
        values = converted(role, form, here, part, strides_of_state(part), float)
        kept.pop(f"{role}_scale", None)
        held |= _named(role, form, p, [x.to(y.dtype) for x, y in zip(values, form.parts)])
    masters = {key: kept.pop(key) for key in MASTER_KEYS if isinstance(kept.get(key), Tensor)}
    if len(stored.param.parts) > 1 and masters:
        if MASTER in masters:
            master, form = here[MASTER].float(), stored.param
            if is_rounded(master, part).all():
                values = [part, *encode_master(form, master, part, strides_of_state(part))]
            else:  # the parameter may be loaded later
                values = encode(form, master, strides_of_state(part))
            held |= _named("", form, p, values)
        else:
            held |= {key: value.to(part.device) for key, value in masters.items()}
    return kept | {key: Held(x) for key, x in held.items()}


def _is_stored(keys: tuple[str, ...], entry: Mapping[str, Any]) -> bool:
    """Whether a checkpoint's entry holds what torch cannot read or would only drag along."""
    return any(key in entry for key in (*MASTER_KEYS, *(f"{key}_scale" for key in keys)))


def _named(role: str, form: Form, p: Tensor, values: list[Tensor]) -> dict[str, Tensor]:
    """A role's parts by their keys in ``optimizer.state[p]``, the parameter itself left out."""
    named = {part_key(role, part): (x, part) for part, x in zip(form.parts, values)}
    return {key: like(p, x) if part.per == 1 else x for key, (x, part) in named.items() if key}


def release(states: dict[Any, Any]) -> None:
    """Put what was held into the states that torch has loaded."""
    for entry in states.values():
        for key, value in entry.items() if isinstance(entry, dict) else ():
            if isinstance(value, Held):
                entry[key] = value.tensor


# Masters


def numbered(optimizer: Any) -> Iterator[tuple[int | str, dict[str, Any], Tensor]]:
    """Every parameter with its group, by its name where all have one, else by its number."""
    groups = optimizer.param_groups
    named = all("param_names" in group for group in groups)
    number = 0
    for group in groups:
        for k, p in enumerate(group["params"]):
            yield group["param_names"][k] if named else number, group, p
            number += 1


@torch.no_grad()
def master_state_dict(optimizer: Any) -> dict[int | str, Tensor]:
    return {key: _master(optimizer, p) for key, _, p in numbered(optimizer)}


def _master(optimizer: Any, p: Tensor) -> Tensor:
    there = found("", {key: local(x) for key, x in optimizer._states.get(p, {}).items()}, local(p))
    if there is None:
        return p.detach().to(wide(p.dtype), copy=True)
    return like(p, decode(*there, wide(p.dtype)))


@torch.no_grad()
def load_master_state_dict(optimizer: Any, masters: Mapping[int | str, Tensor]) -> None:
    if optimizer._engine.averaged:
        raise RuntimeError(
            "load_master_state_dict() inside `with optimizer.ema_parameters()`, behind which the parameters are again "
            "what they were before it: load there"
        )
    params = list(numbered(optimizer))
    _check_masters(params, masters)
    try:
        _take_masters(optimizer, params, masters)
    except BaseException:  # an interrupt on the way, behind which some parameters are the loaded ones and others not
        _take_masters(optimizer, params, masters)
        raise


def _take_masters(
    optimizer: Any, params: Sequence[tuple[int | str, dict[str, Any], Tensor]], masters: Mapping[int | str, Tensor]
) -> None:
    """Set the parameters and what is kept beside them; may be done again, wherever it was interrupted."""
    for key, group, p in params:
        part, value = local(p), local(masters[key])
        stored = storage(p, optimizer.rule(group), optimizer._settings, optimizer._states.get(p, {}))
        value = value.to(part.device, wide(part.dtype))
        values = encode(stored.param, value, strides_of_state(part))
        part.copy_(values[0])
        for key in MASTER_KEYS:  # another form's parts, if ``master`` was changed since they were stored
            optimizer._states.get(p, {}).pop(key, None)
        if len(values) == 1:
            continue
        state = optimizer._states[p]
        # torch's classes take a state without these for a broken one.
        others = _begun(optimizer, group, p, stored) if not state and optimizer.counts_steps else {}
        state |= others | _named("", stored.param, p, values)
    gather_anew(p for _, _, p in params)


def _begun(optimizer: Any, group: dict[str, Any], p: Tensor, stored: Storage) -> dict[str, Tensor]:
    """The states of a parameter as they are before the first step."""
    part = local(p)
    begun = {"step": torch.zeros((), dtype=_get_scalar_dtype())}
    begun |= zip(optimizer.rule(group).scalars, map(torch.tensor, optimizer.initial_scalars(group)))
    for role, form in stored.kept:
        initial = optimizer.initial_value(group, role)
        made = torch.full(part.size(), initial, dtype=wide(part.dtype), device=part.device)
        begun |= _named(role, form, p, encode(form, made, strides_of_state(part)))
    return begun


def _check_masters(params: list[tuple[int | str, dict[str, Any], Tensor]], masters: Any) -> None:
    if not isinstance(masters, Mapping):
        raise TypeError(f"masters are a dict, as master_state_dict() returns it; got {type(masters).__name__}")
    keys = {key for key, _, _ in params}
    if masters.keys() != keys:
        missing, unknown = sorted(map(str, keys - masters.keys())), sorted(map(str, masters.keys() - keys))
        raise ValueError(f"the masters do not fit the parameters: missing {missing[:5]}, unknown {unknown[:5]}")
    for key, _, p in params:
        value = masters[key]
        if not isinstance(value, Tensor) or not value.is_floating_point():
            raise TypeError(
                f"the master of parameter {key!r} must be a tensor of floating-point numbers, got {value!r:.60}"
            )
        if value.shape != p.shape or not distributed_alike(value, p):
            raise ValueError(
                f"the master of parameter {key!r} has shape {tuple(value.shape)} and is a {kind(value)}, "
                f"the parameter has {tuple(p.shape)} and is a {kind(p)}"
            )
