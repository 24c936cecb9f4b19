"""What an optimizer class says of its formula: the rule, and the numbers of a group's step, computed in float64."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from torch.optim.optimizer import _get_scalar_dtype

from .columns import Number, Rounded, number, scalar
from .rule import Numbers, Rule, Stage, Update
from .settings import Settings

CAUTIOUS = Stage("cautious", (), None, terms=("agreement",))


Returned = TypeVar("Returned")


def naming_scalars(method: Callable[..., Returned]) -> Callable[..., Returned]:
    """For type checkers: where the base class has ``*scalars``, a subclass names those that its rule has, or none."""
    return method


FORMULA = frozenset(("hyper", "lr", "update", "decoupled", "decays", "averages", "next_scalars"))
"""What ``Rule.fused`` repeats of a class."""


def as_overridden(rule: Callable[..., Rule]) -> Callable[..., Rule]:
    """The method ``rule`` for a subclass with other numbers: without torch's kernel, which knows nothing of them."""

    @functools.wraps(rule)
    def without_kernel(self: Any, group: dict[str, Any]) -> Rule:
        return _without_kernel(rule(self, group))

    return without_kernel


@functools.lru_cache
def _without_kernel(rule: Rule) -> Rule:
    return rule._replace(fused=None, fused_narrow=None)


class Formula:
    """What ``FusedOptimizer`` asks a subclass: ``rule`` and ``hyper`` of each, the others where they differ from these.

    ``group`` is a parameter group, ``t`` the step counted from 1, and ``scalars`` are the rule's (``Rule.scalars``).
    Where a device counts the steps, ``t``, ``group["lr"]`` and the scalars are columns instead of numbers: what is to
    be computed for each parameter there. Operators work on both; ``fusedopt.columns`` has ``number``, ``where``,
    ``minimum`` and ``maximum``. A formula that asks for more gets float64 tensors [rows, 1].
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "rule" not in vars(cls) and not FORMULA.isdisjoint(vars(cls)):
            cls.rule = as_overridden(cls.rule)

    counts_steps = True
    """Whether torch keeps ``state[p]["step"]``."""

    begins_at_rate = False
    """Whether states begin at the learning rate, that of the first step which is taken."""

    _first_draw = 0
    """The number of the first parameter's first eight elements, for random bits: see ``buckets.Member``."""

    settings_class = Settings
    """What the class takes besides torch's arguments."""

    def rule(self, group: dict[str, Any]) -> Rule:
        """The formula that this group's options select. ValueError if they contradict the settings."""
        raise NotImplementedError(f"{type(self).__name__} has no rule(group) that returns a fusedopt.Rule")

    @naming_scalars
    def hyper(self, group: dict[str, Any], t: Number, *scalars: Rounded) -> Numbers:
        """The rule's ``h`` at the group's ``t``-th step, in float64."""
        raise NotImplementedError(f"{type(self).__name__} has no hyper(group, t) that returns its rule's numbers")

    @naming_scalars
    def lr(self, group: dict[str, Any], t: Number, *scalars: Rounded) -> Number:
        """The learning rate of the ``t``-th step: p <- p - lr u."""
        return number(group["lr"])

    @naming_scalars
    def averages(self, group: dict[str, Any], t: Number, *scalars: Rounded) -> Numbers:
        """The weight of the new parameter in each of the rule's averages."""
        return ()

    def initial_scalars(self, group: dict[str, Any]) -> tuple[Rounded, ...]:
        """The rule's scalars before the first step."""
        values = (self.initial_value(group, key) for key in self.rule(group).scalars)
        return tuple(scalar(value, _get_scalar_dtype()) for value in values)

    @naming_scalars
    def next_scalars(self, group: dict[str, Any], t: Number, *scalars: Rounded) -> Sequence[Rounded]:
        """What the ``t``-th step makes of the rule's scalars; it used ``scalars``."""
        raise NotImplementedError

    def is_capturable(self, group: dict[str, Any]) -> bool:
        """Whether step counts and what follows from them stay on the device, so that a CUDA graph may hold the step."""
        return bool(group.get("capturable") or getattr(self._settings, "capturable", False))

    def decoupled(self, group: dict[str, Any]) -> bool:
        """Whether weight decay is added after the rule instead of to the gradient."""
        return False

    def decays(self, group: dict[str, Any]) -> tuple[float, float]:
        """How much of the parameter is added to the gradient, and to what the rule returns."""
        weight_decay = float(group.get("weight_decay", 0.0))
        return (0.0, weight_decay) if self.decoupled(group) else (weight_decay, 0.0)

    def initial_value(self, group: dict[str, Any], key: str) -> float:
        """What the state ``key`` is filled with before the first step."""
        return 0.0

    def first_update(self, group: dict[str, Any]) -> Update:
        """Which stages a step has, whatever their numbers: as for the first step, with some learning rate."""
        group = {**group, "lr": 1.0}
        return self.update(group, 1, *self.initial_scalars(group))

    @naming_scalars
    def update(self, group: dict[str, Any], t: Number, *scalars: Rounded) -> Update:
        """All numbers of one step of one group. Order as in torch: clip, negate, decay."""
        settings, sign = self._settings, -1.0 if group.get("maximize") else 1.0
        on_grad, on_update = _chains(settings.value_limits, sign, *self.decays(group), settings.cautious)
        lr, h = self.lr(group, t, *scalars), self.hyper(group, t, *scalars)
        return Update(lr, h, on_grad, on_update, self.averages(group, t, *scalars))


@functools.lru_cache
def _chains(
    limits: tuple[float, float], sign: float, in_gradient: float, in_update: float, cautious: bool
) -> tuple[tuple[Stage, ...], tuple[Stage, ...]]:
    """What is done to the gradient before the rule, and to the update after it: mostly the same at every step."""
    on_grad = (
        Stage("clip_value", limits, (-math.inf, math.inf)),
        Stage("maximize", (sign,), (1.0,)),
        Stage("decay", (in_gradient,), (0.0,)),
    )
    decay = Stage("decay", (in_update,), (0.0,))
    return on_grad, ((CAUTIOUS, decay) if cautious else (decay,))
