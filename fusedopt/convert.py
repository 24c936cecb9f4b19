"""A torch.optim optimizer becomes the fused one of the same name, in mid-training too."""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Callable
from typing import Any

import torch

from .optimizer import FusedOptimizer, registry
from .torch_step import base_in_torch, unhooked


def convert(optimizer: torch.optim.Optimizer, **settings: Any) -> FusedOptimizer:
    """Make ``optimizer`` fused, in place: state, groups, defaults and hooks stay the objects that they are.

    In place, since others hold on to the optimizer: schedulers, gradient scalers, trainers, hooks. All of them go on
    with the same object. To keep torch's optimizer, convert a ``copy.deepcopy``. Where it raises, nothing has been
    changed.

    Args:
        optimizer: an instance of a torch.optim class that fusedopt has too, or of a subclass that has no other
            ``step``.
        settings: what fusedopt's class takes besides torch's arguments, for instance ``max_grad_norm=1.0``.

    Returns:
        ``optimizer`` itself, now also an instance of fusedopt's class.

    Raises:
        TypeError: for any other object, and for unknown settings.
        ValueError: for settings with a wrong value, or that contradict the optimizer's options.
    """
    torch_class, fused = _classes(optimizer)
    _check_step(optimizer, torch_class)
    cls = _converted(type(optimizer), torch_class, fused)
    _check_names(optimizer, torch_class, fused)
    unknown = settings.keys() - fused.settings_class.fields().keys()
    if unknown:
        raise TypeError(
            f"convert() takes the settings that fusedopt's {fused.__name__} adds, and {', '.join(sorted(unknown))} is "
            "none: learning rates and the like stay the optimizer's own; "
            f"there are {', '.join(fused.settings_class.fields())}"
        )
    chosen = fused.settings_class(**settings)
    _check_groups(cls, chosen, optimizer)

    tracked = vars(optimizer).pop("step", None)
    optimizer.__class__ = cls
    optimizer.__setstate__({"_settings": chosen})  # as torch's comes out of a pickle
    if tracked is not None:
        optimizer.step = _tracked(optimizer)
    return optimizer


def _classes(optimizer: Any) -> tuple[type, type[FusedOptimizer]]:
    """The class of torch.optim that does the optimizer's steps, and ours for it."""
    if isinstance(optimizer, FusedOptimizer):
        raise TypeError(
            f"this {type(optimizer).__name__} is an optimizer of fusedopt already: "
            "its settings are attributes, as in optimizer.max_grad_norm = 1.0"
        )
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"convert takes an optimizer of torch.optim, got {type(optimizer).__name__}")
    fused = {base_in_torch(cls): cls for cls in registry.values()}
    fused.pop(torch.optim.Optimizer, None)  # the base of those that torch lacks
    for cls in type(optimizer).__mro__:
        if cls in fused:
            return cls, fused[cls]
    known = ", ".join(sorted(cls.__name__ for cls in fused))
    raise TypeError(f"fusedopt has no {type(optimizer).__name__}; it can take over {known}")


def _check_step(optimizer: Any, torch_class: type) -> None:
    """The step must be torch's own: what else it did would be lost."""
    name, classes = type(optimizer).__name__, type(optimizer).__mro__
    # From the base on: with the first instance torch puts the step that a class inherits, with hooks, into it.
    for cls in reversed(classes[: classes.index(torch_class)]):
        step = vars(cls).get("step")
        if (step is not None and unhooked(step) is not unhooked(torch_class.step)) or "_init_group" in vars(cls):
            raise TypeError(f"{name} cannot be converted: {cls.__name__} has a step of its own")
    own = vars(optimizer).get("step")
    if own is None:
        return
    # Schedulers wrap it, to see which of them comes first.
    if not hasattr(own, "_wrapped_by_lr_sched") or unhooked(own.__wrapped__) is not unhooked(torch_class.step):
        raise TypeError(f"this {name} cannot be converted: its attribute 'step' was replaced")


def _check_names(optimizer: Any, torch_class: type, fused: type[FusedOptimizer]) -> None:
    """What an instance or a subclass of the user's defines must not hide what fusedopt needs."""
    own = [name for cls in type(optimizer).__mro__ if not issubclass(torch_class, cls) for name in vars(cls)]
    # Our property ``state`` finds torch's attribute where it is.
    for name in (*(vars(optimizer).keys() - {"state"}), *own):
        if not name.startswith("__") and hasattr(fused, name) and not hasattr(torch_class, name):
            raise TypeError(
                f"this {type(optimizer).__name__} cannot be converted: "
                f"its attribute {name!r} would take the place of one of fusedopt's"
            )


def _check_groups(cls: type[FusedOptimizer], settings: Any, optimizer: torch.optim.Optimizer) -> None:
    trial, groups = object.__new__(cls), optimizer.param_groups
    trial._settings, trial.param_groups = settings, groups
    trial._check_settings()
    for number, group in enumerate(groups):
        settings.refuse_in_group(group, optimizer.defaults)
        trial.rule(group)  # raises where the options contradict the settings
        for key, value in group.items():
            if isinstance(value, float) and math.isnan(value):
                raise ValueError(f"{key!r} of group {number} is {value}; hyperparameters must be numbers")


@functools.cache
def _converted(cls: type, torch_class: type, fused: type[FusedOptimizer]) -> type[FusedOptimizer]:
    """``cls`` as it would be if it were derived from fusedopt's class instead of torch's."""
    if cls is torch_class:
        return fused
    namespace = {
        # Its own ``step`` may be torch's within the wrapper for hooks.
        "step": unhooked(fused.step),
        "__reduce_ex__": _reduce,
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        "_converted_from": (cls, torch_class, fused),
    }
    return type(cls.__name__, (cls, fused), namespace)


def _reduce(self: Any, protocol: int) -> tuple:
    """A pickle names the classes that it was made from, since nobody can import this one."""
    return _new, type(self)._converted_from, self.__getstate__()


def _new(*classes: type) -> FusedOptimizer:
    return object.__new__(_converted(*classes))


def _tracked(optimizer: FusedOptimizer) -> Callable:
    """``step`` as a scheduler wraps it, for the one that it wrapped before."""
    reference, step = weakref.ref(optimizer), type(optimizer).step

    @functools.wraps(step)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        optimizer = reference()
        optimizer._opt_called = True
        return step(optimizer, *args, **kwargs)

    wrapper._wrapped_by_lr_sched = True
    return wrapper
