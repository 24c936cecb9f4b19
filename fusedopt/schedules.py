"""Learning-rate schedules that torch lacks, as ``torch.optim.lr_scheduler.LRScheduler`` for any optimizer.

    CosineRestarts      eta_min + (peak - eta_min) / 2 (1 + cos(pi s / T)), s steps after the latest restart;
                        at each restart T <- period_growth T and peak <- peak_decay peak
    ExponentialWarmup   eta_0 start_factor^(1 - t / steps), then eta_0

t is the number of ``scheduler.step()`` calls so far and eta_0 the group's learning rate before. Both compose: with
each other and with torch's multiplicative schedulers through ``ChainedScheduler``, one after the other through
``SequentialLR``. A tensor ``lr`` keeps its identity and is filled without waiting for its device.

Sources: Loshchilov and Hutter, arXiv 1608.03983 (restarts, there with a whole growth and no decay); warm-up: Goyal et
al., arXiv 1706.02677, there linear.
"""

from __future__ import annotations

import math
import numbers
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

__all__ = ["CosineRestarts", "ExponentialWarmup"]


class _Schedule(LRScheduler):
    """A schedule that knows its value at every t: ``_value(base_lr, t)``."""

    def _value(self, base: Any, t: int) -> Any:
        raise NotImplementedError

    def get_lr(self) -> list[Any]:
        """The groups' learning rates at step ``last_epoch``; where another scheduler changed what this one set, the
        change is kept as a factor."""
        t = self.last_epoch
        groups = self.optimizer.param_groups
        if self._is_initial and t > 0:  # resumed: the checkpoint's learning rates are those of this step
            return [_copy(group["lr"]) for group in groups]
        return [
            _carried(group["lr"], base if t == 0 else self._value(base, t - 1), self._value(base, t))
            for group, base in zip(groups, self.base_lrs)
        ]

    def _get_closed_form_lr(self) -> list[Any]:
        return [self._value(base, self.last_epoch) for base in self.base_lrs]


class CosineRestarts(_Schedule):
    """Cosine annealing with warm restarts, whose period grows and whose peak falls.

        lr = eta_min + (peak - eta_min) / 2 (1 + cos(pi s / T)), s steps after the latest restart
        at each restart T <- period_growth T and peak <- peak_decay peak; first T = period and peak = the group's lr

    With ``peak_decay=1`` and whole ``period`` and ``period_growth`` this is torch's CosineAnnealingWarmRestarts.
    Source: Loshchilov and Hutter, arXiv 1608.03983.

    Args:
        optimizer: any torch optimizer; ``lr`` a float or a tensor of any float dtype with one element.
        period (float): steps of the first cycle, at least 1. It need not be whole.
        period_growth (float): at least 1; 1.5 to 2 are usual.
        peak_decay (float): above 0 and at most 1; 0.7 to 0.9 are usual.
        eta_min (float): the lower end of every cycle; a peak never falls below it.
        last_epoch (int): as in torch's schedulers.

    Raises:
        TypeError, ValueError: for arguments that are no numbers or outside these ranges.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        period: float,
        period_growth: float = 1.5,
        peak_decay: float = 0.8,
        eta_min: float = 0.0,
        last_epoch: int = -1,
    ):
        self.period = _number("period", period, low=1)
        self.period_growth = _number("period_growth", period_growth, low=1)
        self.peak_decay = _number("peak_decay", peak_decay, above=0, high=1)
        self.eta_min = _number("eta_min", eta_min, low=0)
        super().__init__(optimizer, last_epoch)

    def cycle(self, t: float) -> tuple[int, float, float]:
        """The number of restarts before step t, the steps since the latest one, and the length of this cycle."""
        if self.period_growth == 1:
            restarts, since = divmod(t, self.period)
            return int(restarts), since, self.period
        restarts, length = 0, self.period
        while t >= length:
            t -= length
            length *= self.period_growth
            restarts += 1
        return restarts, t, length

    def _value(self, base: Any, t: int) -> Any:
        restarts, since, length = self.cycle(t)
        height = base * self.peak_decay**restarts - self.eta_min
        if self.peak_decay < 1:
            height = height.clamp(min=0) if isinstance(height, Tensor) else max(height, 0.0)
        return self.eta_min + height * (1 + math.cos(math.pi * since / length)) / 2


class ExponentialWarmup(_Schedule):
    """Exponential warm-up to the given learning rate.

        lr = eta_0 start_factor^(1 - t / steps) at steps t < steps, then eta_0, the group's lr

    Source: the practice of Goyal et al., arXiv 1706.02677, section 2.2, with a geometric instead of a linear rise.

    Args:
        optimizer: any torch optimizer; ``lr`` a float or a tensor of any float dtype with one element.
        steps (float): how many steps the rise takes, at least 1.
        start_factor (float): above 0 and at most 1; the first step's learning rate is start_factor eta_0.
        last_epoch (int): as in torch's schedulers.

    Raises:
        TypeError, ValueError: for arguments that are no numbers or outside these ranges.
    """

    def __init__(self, optimizer: Optimizer, steps: float, start_factor: float = 1e-3, last_epoch: int = -1):
        self.steps = _number("steps", steps, low=1)
        self.start_factor = _number("start_factor", start_factor, above=0, high=1)
        super().__init__(optimizer, last_epoch)

    def _value(self, base: Any, t: int) -> Any:
        return base * self.start_factor ** max(1 - t / self.steps, 0.0)


def _carried(lr: Any, previous: Any, now: Any) -> Any:
    """``now``, times what others made of ``previous``."""
    if isinstance(lr, Tensor):
        return torch.where((lr == previous) | (previous == 0), now, lr * (now / previous))
    return now if lr == previous or previous == 0 else lr * (now / previous)


def _copy(lr: Any) -> Any:
    return lr.clone() if isinstance(lr, Tensor) else lr


def _number(
    name: str, value: Any, low: float = -math.inf, above: float = -math.inf, high: float = math.inf
) -> int | float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not (low <= value <= high and value > above and math.isfinite(value)):
        allowed = f"finite and at least {low}" if low > above else f"above {above} and at most {high}"
        raise ValueError(f"Invalid {name}: {value}; give a number that is {allowed}")
    return value
