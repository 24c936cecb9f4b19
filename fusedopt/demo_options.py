"""What ``--schedule`` and ``--stop`` of ``python -m fusedopt`` stand for."""

from collections.abc import Callable

import torch
from torch.optim import Optimizer, lr_scheduler
from torch.optim.lr_scheduler import LRScheduler

import fusedopt
from fusedopt.schedules import CosineRestarts, ExponentialWarmup
from fusedopt.stopping import Criterion, Divergence, Iterations, LossBelow, SmallChange

SCHEDULES: dict[str, Callable[[Optimizer, int], LRScheduler]] = {
    "exponential": lambda o, steps: lr_scheduler.ExponentialLR(o, 0.01 ** (1 / steps)),
    "step": lambda o, steps: lr_scheduler.StepLR(o, -(-steps // 4), 0.5),
    "cosine": lambda o, steps: lr_scheduler.CosineAnnealingLR(o, steps),
    # 1 + 1.5 + 1.5^2 + 1.5^3 = 8.1: four cycles.
    "restarts": lambda o, steps: CosineRestarts(o, max(steps / 8, 1)),
    "plateau": lambda o, steps: lr_scheduler.ReduceLROnPlateau(o, factor=0.5, patience=4),
    "cyclic": lambda o, steps: lr_scheduler.CyclicLR(
        o, rate(o) / 10, rate(o), -(-steps // 8), mode="triangular2", cycle_momentum=False
    ),
    "onecycle": lambda o, steps: lr_scheduler.OneCycleLR(
        o, rate(o), steps + 1, anneal_strategy="linear", cycle_momentum=False
    ),
    "warmup": lambda o, steps: warmup(o, steps, -(-steps // 10)),
}
"""``make(optimizer, steps)`` for a training of that many steps, after each of which the schedule is advanced; "plateau"
after each epoch."""

CRITERIA: dict[str, tuple[Callable[[Optimizer, float], Criterion], type]] = {
    "iterations": (lambda optimizer, number: Iterations(number), int),
    "change": (lambda optimizer, tolerance: small_change(optimizer, tolerance), float),
    "loss": (lambda optimizer, target: LossBelow(target), float),
    "divergence": (lambda optimizer, patience: Divergence(patience), int),
}
"""``make(optimizer, number)`` and the kind of number, for criteria that are asked after each epoch."""


def small_change(optimizer: Optimizer, tolerance: float) -> SmallChange:
    """Of the latest step, which tells it where the optimizer is ours."""
    if isinstance(optimizer, fusedopt.FusedOptimizer):
        optimizer.track = "total"
    return SmallChange(optimizer, tolerance)


def warmup(optimizer: Optimizer, steps: int, rise: int) -> LRScheduler:
    """``rise`` steps up, and down along a cosine in the others."""
    fall = lr_scheduler.CosineAnnealingLR(optimizer, max(steps - rise, 1))
    return lr_scheduler.SequentialLR(optimizer, [ExponentialWarmup(optimizer, rise), fall], [rise])


def rate(optimizer: Optimizer) -> float:
    return optimizer.param_groups[0]["lr"]


def criterion(text: str) -> Callable[[Optimizer], Criterion]:
    """``loss=0.1`` and its like; ValueError with a message that lists what there is."""
    name, _, number = text.partition("=")
    if name not in CRITERIA:
        raise ValueError(f"{text!r} is none of {', '.join(f'{known}=NUMBER' for known in CRITERIA)}")
    make, kind = CRITERIA[name]
    try:
        value = kind(number)
    except ValueError:
        raise ValueError(f"{text!r}: {number!r} is no {kind.__name__}") from None
    make(torch.optim.SGD([torch.zeros(1)]), value)  # raises for a number that is out of range
    return lambda optimizer: make(optimizer, value)
