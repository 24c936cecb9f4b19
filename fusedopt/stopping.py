"""When to stop training: criteria that are asked once after each step, and combined with ``|``.

    Iterations(n)                     t = n
    SmallChange(optimizer, tol)       ||theta_t - theta_(t-1)|| < tol, the norm over all parameters
    LossBelow(target)                 loss <= target
    Divergence(patience)              loss is NaN or infinite, or rose at ``patience`` looks in a row

    stop = Iterations(3000) | SmallChange(optimizer, 1e-4) | LossBelow(0.1) | Divergence()
    while True:
        loss = ...
        optimizer.step()
        if stop(loss):
            break
    print(stop.reason)

A loss on a GPU, and the change of the parameters, are waited for only at every ``check_every``-th step. An optimizer of
fusedopt with ``track="total"`` takes that change while it makes it, and nothing is copied.

On several ranks all must stop together, or those that go on wait for the others for ever: give a loss that was averaged
over them. The change of distributed parameters is that of the whole on every rank; of pipeline stages, and of what
ZeroRedundancyOptimizer and FullyShardedDataParallel divide, with ``track`` and ``clip_group`` only.
"""

from __future__ import annotations

import math
import numbers
from typing import Any

import torch
from torch import Tensor

__all__ = ["Criterion", "Divergence", "Iterations", "LossBelow", "SmallChange"]


class Criterion:
    """A question asked after each step. ``reason`` says why the latest answer was yes; else it is None.

    Formulas and arguments stand with each subclass. ``a | b`` stops where a or b does. Raises TypeError or ValueError
    for arguments of a wrong kind or size.
    """

    reason: str | None = None

    def __init__(self, check_every: int = 1):
        self.check_every = _whole("check_every", check_every)
        self.step = 0

    def __call__(self, loss: float | Tensor | None = None) -> bool:
        """Count one step, and say whether to stop.

        Args:
            loss: of this step, a number or a tensor of one element, of any dtype and device; None where no criterion
                asks for it.
        """
        self.step += 1
        self.reason = self._look(loss) if self.step % self.check_every == 0 else None
        return self.reason is not None

    def _look(self, loss: float | Tensor | None) -> str | None:
        raise NotImplementedError

    def __or__(self, other: Criterion) -> Criterion:
        if not isinstance(other, Criterion):
            return NotImplemented
        return _Either([*_members(self), *_members(other)])


class _Either(Criterion):
    def __init__(self, members: list[Criterion]):
        super().__init__()
        self.members = members

    def _look(self, loss: float | Tensor | None) -> str | None:
        # All of them: each counts its own steps.
        fired = [member for member in self.members if member(loss)]
        return "; ".join(member.reason for member in fired) if fired else None


class Iterations(Criterion):
    """S1: stop after ``number`` steps, an int above zero (else TypeError or ValueError).

    Formula: t = number. Source: every textbook's first criterion.
    """

    def __init__(self, number: int):
        super().__init__()
        self.number = _whole("number", number)

    def _look(self, loss: float | Tensor | None) -> str | None:
        return f"{self.step} iterations" if self.step >= self.number else None


class SmallChange(Criterion):
    """S2: stop where a step changes the parameters by less than ``tolerance``.

    Formula: ||theta_t - theta_(t-1)|| < tolerance, the Euclidean norm over all parameters of all groups. Source: the
    usual criterion of numerical optimisation (Nocedal and Wright, Numerical Optimization, 2006).

    Where the optimizer is one of fusedopt whose ``track`` is set, the norm is ``optimizer.metrics.update_norm`` of its
    latest step: over all ranks, and before rounding to the parameters' dtype. Otherwise it is that of the difference
    to a copy of the parameters, taken in float64; the copy is held from the step before a look until that look. A step
    that the optimizer skipped (``skip_nonfinite``, a loss scale) is no small one.

    Args:
        optimizer: any torch optimizer; parameters of any shape and real or complex dtype.
        tolerance (float): above zero, 1e-4 by default.
        check_every (int): look at every ``check_every``-th step only, since the host then waits for the device.

    Raises:
        TypeError, ValueError: for arguments of a wrong kind or size.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, tolerance: float = 1e-4, check_every: int = 10):
        super().__init__(check_every)
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"{type(optimizer).__name__} is not an Optimizer")
        self.optimizer = optimizer
        self.tolerance = _number("tolerance", tolerance)
        if self.tolerance <= 0:
            raise ValueError(f"Invalid tolerance: {tolerance}; give a number above zero")
        self.before: list[Tensor] = []
        self._keep()

    def __call__(self, loss: float | Tensor | None = None) -> bool:
        stop = super().__call__(loss)
        self._keep()
        return stop

    def _parameters(self) -> list[Tensor]:
        return [p.detach() for group in self.optimizer.param_groups for p in group["params"]]

    @property
    def _is_tracked(self) -> bool:
        return getattr(self.optimizer, "track", None) is not None

    def _keep(self) -> None:
        """Note how things are if the next step is one to look at: a copy of the parameters, if nobody else has it."""
        looks = (self.step + 1) % self.check_every == 0
        self.skipped = self._skipped_steps() if looks else 0
        self.before = [p.clone() for p in self._parameters()] if looks and not self._is_tracked else []

    def _skipped_steps(self) -> Tensor | int:
        return getattr(self.optimizer, "skipped_steps", 0)

    def _look(self, loss: float | Tensor | None) -> str | None:
        if self._skipped_steps() != self.skipped:
            return None
        change = self._tracked() if self._is_tracked else self._difference()
        if change is None or not change < self.tolerance:
            return None
        return f"the parameters changed by {change:.3g} < {self.tolerance:g}"

    def _tracked(self) -> float | None:
        metrics = self.optimizer.metrics
        return None if metrics is None else torch.linalg.vector_norm(metrics.update_norm).item()

    def _difference(self) -> float | None:
        after = self._parameters()
        if len(after) != len(self.before):  # a group was added: nothing to compare with
            return None
        norms: dict[tuple[torch.device, Any], list[Tensor]] = {}
        """By device and, of distributed parameters, mesh: torch stacks no tensors of different ones."""
        for a, b in zip(after, self.before):
            wide = torch.promote_types(a.dtype, torch.float64)
            where = a.device, getattr(a, "device_mesh", None)
            norms.setdefault(where, []).append(torch.linalg.vector_norm(a - b, dtype=wide))
        return math.hypot(*(torch.linalg.vector_norm(torch.stack(each)).item() for each in norms.values()))


class LossBelow(Criterion):
    """S3: stop where the loss reaches ``target``.

    Formula: loss <= target, a float that is finite (else TypeError or ValueError), 0.1 by default. With
    ``check_every=k`` the loss is looked at every k-th step only. Source: every textbook.
    """

    def __init__(self, target: float = 0.1, check_every: int = 1):
        super().__init__(check_every)
        self.target = _number("target", target)

    def _look(self, loss: float | Tensor | None) -> str | None:
        value = _value(self, loss)
        return f"the loss reached {value:.3g} <= {self.target:g}" if value <= self.target else None


class Divergence(Criterion):
    """S4: stop where the loss is NaN or infinite, or rose at ``patience`` looks in a row.

    Formula: not finite(loss_t), or loss_t > loss_(t-1) > ... > loss_(t-patience). ``patience`` is an int above zero
    (else TypeError or ValueError), 10 by default; losses of mini-batches rise by chance, one in two. With
    ``check_every=k`` only every k-th loss is looked at. Source: every textbook.
    """

    def __init__(self, patience: int = 10, check_every: int = 1):
        super().__init__(check_every)
        self.patience = _whole("patience", patience)
        self.latest = math.inf
        self.rises = 0

    def _look(self, loss: float | Tensor | None) -> str | None:
        value = _value(self, loss)
        self.rises = self.rises + 1 if value > self.latest else 0
        self.latest = value
        if not math.isfinite(value):
            return f"the loss is {value}"
        return f"the loss rose {self.rises} times in a row, to {value:.3g}" if self.rises >= self.patience else None


def _members(criterion: Criterion) -> list[Criterion]:
    return criterion.members if isinstance(criterion, _Either) else [criterion]


def _value(criterion: Criterion, loss: float | Tensor | None) -> float:
    if loss is None:
        raise TypeError(f"{type(criterion).__name__} looks at the loss: call the criterion as stop(loss)")
    return float(loss.item() if isinstance(loss, Tensor) else loss)


def _whole(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be a whole number, got {value!r}")
    if value < 1:
        raise ValueError(f"Invalid {name}: {value}; give at least 1")
    return int(value)


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"Invalid {name}: {value}; give a finite number")
    return float(value)
