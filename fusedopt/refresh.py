"""``optimizer.refresh()``: CUDA graphs are told of options that have changed since they were captured.

A replay sends the numbers of its step to the GPU once more, from memory on the host that was filled at the capture.
Here that memory is filled again. What the device computes from its own step counts, such as bias corrections, is part
of the graph's operations: an option that goes into these cannot change without another capture.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence, Set
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .cohorts import Cohort, StepNumbers
from .hooks import warn
from .options import Options
from .rule import Rule, Update

AGAIN = "; undo it, or capture the graph again"
IN_ROWS = {"max_grad_value"}
"""Settings that are numbers of a row. Others are arguments of the kernels, or decide which there are."""
COUNTS = (1.0, 2.0, 10.0, 1000.0)
"""Step counts at which formulas are compared."""


class Captured(NamedTuple):
    """What one CUDA graph goes on using."""

    plan: Any
    executors: Sequence[Any]
    settings: Any
    """A copy, as they were."""


def refresh(optimizer: Any, graphs: Sequence[Captured]) -> None:
    """Fill the memory of these graphs with what the groups say now; RuntimeError, and no change, where that is not
    all. Only a warning, where another graph was captured since."""
    if not graphs:
        return
    latest = graphs[-1]
    told: list[tuple[Tensor, np.ndarray]] = []
    for graph in graphs:
        with _of_latest(graph is latest):
            _check_settings(optimizer, graph.settings)
    for executor in dict.fromkeys(executor for graph in graphs for executor in graph.executors):
        rows = executor.rows
        for frozen in rows.graphs:
            with _of_latest(executor in latest.executors and frozen is rows.graphs[-1]):
                told += rows.of_graph(optimizer, frozen)
    for device in {device for graph in graphs for device in graph.plan.devices if device.type == "cuda"}:
        torch.cuda.synchronize(device)  # replays that were launched may not have read it yet
    for memory, values in told:
        memory.copy_(torch.from_numpy(values))


@contextlib.contextmanager
def _of_latest(is_latest: bool) -> Iterator[None]:
    """What is wrong with a graph, raised only if it is the latest: nobody says which ones are replayed no more."""
    try:
        yield
    except RuntimeError as problem:
        if is_latest:
            raise
        warn(f"a CUDA graph stays as it is, since another was captured later: {problem}")


def _check_settings(optimizer: Any, before: Any) -> None:
    for name in before.fields().keys() - IN_ROWS:
        old, new = getattr(before, name), getattr(optimizer._settings, name)
        if old != new:
            raise RuntimeError(f"{name} was {old!r} when a CUDA graph was captured, and is {new!r}{AGAIN}")


def check_rule(optimizer: Any, rule: Rule, groups: Sequence[dict[str, Any]]) -> None:
    if any(optimizer.rule(group) is not rule for group in groups):
        raise RuntimeError(f"options ask for another formula than {rule.name!r}, which a CUDA graph has{AGAIN}")


def check_stages(before: Any, now: Any) -> None:
    """Whether the kernel that was made for the numbers before serves those of now."""
    if before is not now:
        raise RuntimeError(
            "options that were 0, or had no effect, when a CUDA graph was captured have one now, or the other way "
            f"round, and its kernel is made for what there was{AGAIN}"
        )


class FrozenFamily(NamedTuple):
    """What a graph holds of groups with the same options, where the device counts: see triton_columns.py."""

    groups: list[dict[str, Any]]
    aside: Set[str]
    """Keys that they may differ in."""
    options: dict[str, Any]
    """Those of all of them, at the capture; tensors where replays read these."""
    live: list[Tensor] | None
    """Their learning rates, where these are tensors that replays read."""
    rates: Tensor | None
    """Otherwise the host's memory of them."""
    constants: Tensor
    """The host's memory of what the device does not compute."""

    def updates(self, optimizer: Any, columns: Callable[[Update], list]) -> tuple[Update, list]:
        """The update as it is now, and what is to be written."""
        rates = [group.get("lr") for group in self.groups]
        if self.live is not None and any(a is not b for a, b in zip(rates, self.live)):
            raise RuntimeError(f"a learning rate is not the tensor that a CUDA graph reads: write into that{AGAIN}")
        options = Options(self.groups, self.aside)
        if set(options.first_alike()) != {0}:
            raise RuntimeError(f"groups had the same options when a CUDA graph was captured, and differ now{AGAIN}")
        then, now = _on_host(self.options), _on_host(options.in_common(self.groups[0]))
        (_, before), (update, after) = (_evaluated(optimizer, each, columns) for each in (then, now))
        for old, new in zip(before, after, strict=True):
            if isinstance(old, Tensor) != isinstance(new, Tensor) or (isinstance(old, Tensor) and not _same(old, new)):
                changed = [key for key, x in now.items() if x != then.get(key)]
                raise RuntimeError(
                    f"{', '.join(changed)} changed, and goes into what a CUDA graph computes from its own step counts "
                    f"(capturable=True){AGAIN}"
                )
        width = self.constants.shape[1]
        known = [0.0 if isinstance(x, Tensor) else x for x in after[:width]]
        found = [(self.constants, np.array([known + [0.0] * (width - len(known))]))]
        if self.rates is not None:
            found.append((self.rates, np.array(list(map(float, rates)))[:, None]))
        return update, found


def _on_host(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _on_host(x) for key, x in value.items()}
    if isinstance(value, (tuple, list)):
        return tuple(map(_on_host, value))
    return float(value) if isinstance(value, Tensor) and value.numel() == 1 else value


def _evaluated(optimizer: Any, options: dict[str, Any], columns: Callable[[Update], list]) -> tuple[Update, list]:
    """A step's numbers at some counts and one learning rate, as a capture sees them: those that the device computes
    as columns. Behind a row's the scalars that come after it."""
    t = torch.tensor(COUNTS, dtype=torch.float64, device="cpu").unsqueeze(1)
    group = {**options, "lr": torch.full_like(t, 0.1)}
    scalars = tuple(torch.full_like(t, x) for x in optimizer.initial_scalars({**options, "lr": 0.1}))
    update = StepNumbers(optimizer)(Cohort(0, group, t - 1, scalars))
    later = optimizer.next_scalars(group, t, *scalars) if scalars else ()
    return update, [*columns(update), *later]


def _same(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)
