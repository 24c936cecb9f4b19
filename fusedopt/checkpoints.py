"""Whether a state_dict fits an optimizer, looked at before anything is changed.

torch loads what it is given and fails at a later step, or at none. Here whatever a step would stumble over is an error
while the optimizer is still as it was, and the error names the entry. What torch loads and works with is let pass:
options that an old checkpoint does not know, keys and states that nobody reads, steps that are numbers.
"""

from __future__ import annotations

import copy
import functools
import inspect
import math
from collections.abc import Callable, Mapping
from itertools import chain
from typing import Any

from torch import Tensor
from torch.nn.parameter import is_lazy

from . import conversion
from .arguments import check_rates
from .rule import Rule
from .shards import distributed_alike, kind, local
from .storage import MASTER_KEYS, NARROW, quantization_problem
from .torch_step import base_in_torch

ANOTHER = "was it saved by another optimizer, or cut off?"


def load(optimizer: Any, state_dict: Any, load_by_torch: Callable[[Any], None]) -> None:
    """Load what fits, and raise otherwise."""
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"a state_dict is a dict, as state_dict() returns it; got {type(state_dict).__name__}")
    handles = [optimizer.register_load_state_dict_pre_hook(hook) for hook in (check, conversion.hold)]
    try:
        load_by_torch(state_dict)
    finally:
        for handle in handles:
            handle.remove()


def check(optimizer: Any, state_dict: Mapping[str, Any]) -> None:
    """Raise an error that names the first entry which ``optimizer`` could not go on with.

    It runs as the last of the hooks before loading, since those of users may make fit what does not.
    """
    for key in ("param_groups", "state"):
        if key not in state_dict:
            raise KeyError(f"the state_dict has no {key!r}, only {_listed(state_dict)}")
    groups, states = copy.deepcopy(state_dict["param_groups"]), state_dict["state"]
    _check_sizes(optimizer, groups)
    keys = [group["params"] for group in groups]
    for group, mine in zip(groups, optimizer.param_groups):
        group["params"] = mine["params"]
    _load_on_trial(optimizer, groups, {})
    for number, group in enumerate(groups):
        _check_numbers(optimizer, group, f"state_dict['param_groups'][{number}]")
    check_rates(optimizer, groups)
    if not isinstance(states, Mapping):
        raise TypeError(f"state_dict['state'] must be a dict, got {type(states).__name__}")
    for number, group in enumerate(groups):
        names = group.get("param_names", ())
        for index, (key, p) in enumerate(zip(keys[number], group["params"])):
            name = f", {names[index]!r}" if index < len(names) else ""
            where = f"state_dict['state'][{key!r}] (parameter {index} of group {number}{name})"
            _check_entry(optimizer, group, p, states.get(key, {}), where)
    by_key = dict(zip(chain.from_iterable(keys), (p for group in groups for p in group["params"])))
    _load_on_trial(optimizer, groups, {by_key.get(key, key): copy.copy(entry) for key, entry in states.items()})


def _check_sizes(optimizer: Any, saved: Any) -> None:
    """torch's own exceptions, with the numbers that do not match."""
    groups = optimizer.param_groups
    if not isinstance(saved, (list, tuple)):
        raise TypeError(f"state_dict['param_groups'] must be a list, got {type(saved).__name__}")
    if len(saved) != len(groups):
        raise ValueError(
            f"loaded state dict has a different number of parameter groups: {len(saved)}, "
            f"the optimizer has {len(groups)}"
        )
    listed = set()
    for number, (group, mine) in enumerate(zip(saved, groups)):
        where = f"state_dict['param_groups'][{number}]"
        if not isinstance(group, Mapping):
            raise TypeError(f"{where} must be a dict, got {type(group).__name__}")
        if "params" not in group:
            raise KeyError(f"{where} has no 'params', only {_listed(group)}")
        keys, params = group["params"], mine["params"]
        if not isinstance(keys, (list, tuple)):
            raise TypeError(f"{where}['params'] must be a list, got {type(keys).__name__}")
        if len(keys) != len(params):
            raise ValueError(
                "loaded state dict contains a parameter group that doesn't match the size of optimizer's group: "
                f"{where} has {len(keys)} parameters, the optimizer's has {len(params)}"
            )
        for key in keys:
            # Twice the same number is right for a parameter that is listed twice.
            if key in listed and len(set(params)) == len(params):
                raise ValueError(f"{where}['params'] lists {key!r}, which was listed before")
            listed.add(key)


def _load_on_trial(optimizer: Any, groups: list[dict], states: dict) -> None:
    """Let torch's class fill in what old checkpoints lack, in copies, and hear what it cannot work with."""
    trial_class = _trial_class(type(optimizer))
    trial = object.__new__(trial_class)
    trial.defaults = dict(optimizer.defaults)
    try:
        trial.__setstate__({"state": states, "param_groups": groups})
    except Exception as error:
        name = trial_class.__base__.__name__
        raise ValueError(f"torch's {name} cannot load the state_dict: {type(error).__name__}: {error}") from error


@functools.cache
def _trial_class(cls: type) -> type:
    """torch's class behind ``cls``, without the wrapping of its ``step`` that loading does otherwise."""
    return type("Trial", (base_in_torch(cls),), {"_patch_step_function": lambda self: None})


def _options(optimizer: Any) -> list[str]:
    """The names that a parameter group must have: what the constructors of torch and of fusedopt take."""
    classes = (c for c in type(optimizer).__mro__ if c.__module__.startswith(("torch.optim.", "fusedopt.")))
    known = {name for c in classes for name in inspect.signature(c.__init__).parameters}
    return [name for name in optimizer.defaults if name in known]


def _check_numbers(optimizer: Any, group: dict[str, Any], where: str) -> None:
    for key, value in group.items():
        if isinstance(value, float) and (math.isnan(value) or (key == "lr" and math.isinf(value))):
            raise ValueError(f"{where}[{key!r}] is {value}; hyperparameters must be finite numbers")
    try:
        for key in _options(optimizer):
            group[key]
        for key in optimizer.rule(group).keys:
            optimizer.initial_value(group, key)
        scalars = optimizer.initial_scalars(group)
        optimizer.update(group, 1, *scalars)
        if scalars:
            optimizer.next_scalars(group, 1, *scalars)
    except KeyError as error:
        raise ValueError(f"{where} has no {error}, only {_listed(group)}; {ANOTHER}") from None
    except (TypeError, ValueError) as error:
        raise type(error)(f"{where}: {error}") from error
    except (ArithmeticError, AttributeError, IndexError, RuntimeError) as error:
        raise ValueError(f"{where} is of no use to {type(optimizer).__name__}: {error}") from error


def _check_entry(optimizer: Any, group: dict[str, Any], p: Tensor, entry: Any, where: str) -> None:
    if not isinstance(entry, Mapping):
        raise TypeError(f"{where} must be a dict, got {type(entry).__name__}")
    if not entry:
        return  # a parameter that had no gradient yet
    if optimizer.counts_steps:
        if "step" not in entry:
            raise ValueError(f"{where} has no 'step', only {_listed(entry)}; {ANOTHER}")
        _check_step(entry["step"], where)
    elif "step" in entry and (optimizer.master or optimizer.state_dtype):  # random bits depend on it
        _check_step(entry["step"], where)
    rule = optimizer.rule(group)
    for key in rule.scalars:
        if key not in entry:
            raise ValueError(f"{where} has no {key!r}, only {_listed(entry)}; {ANOTHER}")
        _number(entry[key], f"{where}[{key!r}]")
    for key in rule.keys:
        if entry.get(key) is None and not optimizer.counts_steps:
            continue  # SGD's buffer is absent, or None, before the first step
        if key not in entry:
            raise ValueError(f"{where} has no {key!r}, only {_listed(entry)}; {ANOTHER}")
        _check_state(rule, key, entry, p, where)
    if p.dtype in NARROW:
        _check_master(entry, p, where)


def _check_state(rule: Rule, key: str, entry: Mapping, p: Tensor, where: str) -> None:
    value, scale = entry[key], entry.get(f"{key}_scale")
    if not isinstance(value, Tensor):
        raise TypeError(f"{where}[{key!r}] must be a tensor, got {type(value).__name__}")
    _check_distribution(value, p, f"{where}[{key!r}]")
    if not is_lazy(p) and value.shape != p.shape:
        raise ValueError(f"{where}[{key!r}] has shape {tuple(value.shape)}, the parameter {tuple(p.shape)}")
    if problem := quantization_problem(rule, key, local(value), scale):
        raise ValueError(f"{where}: {problem}")
    if value.is_floating_point() and isinstance(scale, Tensor) and f"{key}_scale" not in rule.keys:
        raise ValueError(
            f"{where}[{key!r}] has dtype {value.dtype}, but {key + '_scale'!r} beside it belongs to 8 bits: who "
            "cast the one lost what the other means"
        )


def _check_distribution(value: Tensor, p: Tensor, where: str) -> None:
    if not distributed_alike(value, p):
        raise ValueError(
            f"{where} is a {kind(value)} and the parameter a {kind(p)}; load states of distributed parameters with "
            "torch.distributed.checkpoint.state_dict.set_optimizer_state_dict"
        )


def _check_master(entry: Mapping, p: Tensor, where: str) -> None:
    for key, dtypes in MASTER_KEYS.items():
        value = entry.get(key, p)
        if not isinstance(value, Tensor):
            raise TypeError(f"{where}[{key!r}] must be a tensor, got {type(value).__name__}{_unflattened(value)}")
        _check_distribution(value, p, f"{where}[{key!r}]")
        if value.shape != p.shape:
            raise ValueError(f"{where}[{key!r}] has shape {tuple(value.shape)}, the parameter {tuple(p.shape)}")
        if key in entry and value.dtype not in dtypes:
            raise ValueError(f"{where}[{key!r}] has dtype {value.dtype}, not {' or '.join(map(str, dtypes))}")


def _unflattened(value: Any) -> str:
    """What torch.distributed.checkpoint puts where a flat state_dict lacks a key of ``optimizer.state``."""
    if value != {}:
        return ""
    return (
        ", as from a flat state_dict, which cannot hold masters in parts: leave flatten_optimizer_state_dict out, or "
        "load with master='fp32', which may be changed behind it"
    )


def _check_step(step: Any, where: str) -> None:
    if not 0 <= _number(step, f"{where}['step']") < math.inf:
        raise ValueError(f"{where}['step'] must be a number of steps, got {step!r}")


def _number(value: Any, where: str) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{where} must be a number, got {value!r}") from error


def _listed(mapping: Mapping) -> str:
    return ", ".join(map(repr, mapping)) or "nothing"
