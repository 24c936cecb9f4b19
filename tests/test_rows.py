"""Rows of hyperparameters for many parameter groups: one evaluation of a formula serves those that differ in the
learning rate only."""

import math

import numpy as np
import pytest
import torch
from cases import every_option, label
from options import LR
from torch.utils._python_dispatch import TorchDispatchMode

import fusedopt
from fusedopt import triton_rows
from fusedopt.cohorts import StepNumbers
from fusedopt.launch import Launches
from fusedopt.skips import Skips

COUNT = 16

pytestmark = pytest.mark.usefixtures("needs_triton", "no_launches")


@pytest.fixture
def no_launches(monkeypatch):
    """Rows are written by the host."""
    monkeypatch.setattr(Launches, "__call__", lambda self, *args, **constants: None)


def stepped(cls, options, device, **settings):
    """An optimizer of many groups with learning rates of their own, after two steps, and a third one for some."""
    groups = [{"params": [torch.nn.Parameter(torch.ones(3, device=device))]} for _ in range(COUNT)]
    for number, group in enumerate(groups):
        group["lr"] = options.get("lr", LR) * (1 + number / COUNT)
        if number % 2 and "weight_decay" in options:
            group["weight_decay"] = 0.1
    optimizer = cls(groups, **options, **settings, backend="triton")
    for turn in range(3):
        for group in groups[: COUNT // 2 if turn == 2 else COUNT]:
            group["params"][0].grad = torch.ones(3, device=device)
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def both(optimizer, monkeypatch):
    """What each bucket tells the device: by options and by cohort, for two counts of skipped steps."""
    monkeypatch.setattr(triton_rows, "SHARED", 1)
    for executor in optimizer._engine.executors:
        if executor.rows.joins:
            numbers = StepNumbers(optimizer), 2
            yield executor.rows._by_options(*numbers), executor.rows._by_cohort(*numbers)


@every_option
def test_one_evaluation_gives_the_same_rows(name, options, device, monkeypatch):
    """To the last bit."""
    optimizer = stepped(fusedopt.registry[name], options, device)
    for (chains, rows), (other_chains, other_rows) in both(optimizer, monkeypatch):
        assert chains is other_chains
        assert np.array_equal(rows, other_rows)


def test_stochastic_rounding_counts_the_steps_too(device, monkeypatch):
    params = [torch.nn.Parameter(torch.ones(3, device=device, dtype=torch.bfloat16)) for _ in range(COUNT)]
    optimizer = fusedopt.AdamW([{"params": [p]} for p in params], master="stochastic", backend="triton")
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    ((_, rows), (_, other_rows)) = next(both(optimizer, monkeypatch))
    assert np.array_equal(rows, other_rows)
    assert rows[:2, -1].tolist() == [2, 1]


def test_formulas_are_evaluated_once_for_all_groups(device, monkeypatch):
    optimizer = stepped(fusedopt.AdamW, {"weight_decay": 0.05}, device)
    params = [p for group in optimizer.param_groups for p in group["params"]]
    calls = []
    update = optimizer.update
    monkeypatch.setattr(optimizer, "update", lambda *args: calls.append(args) or update(*args))
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert len(calls) == 4  # two weight decays, two counts of steps
    for number, group in enumerate(optimizer.param_groups):
        group["betas"] = (0.8, 0.9 + number / 1000)
    optimizer.step()
    assert len(calls) == 4 + COUNT


class Operations(TorchDispatchMode):
    """Of torch, by name."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "settings",
    [{}, {"max_grad_norm": 1.0}, {"track": "total", "ema_decay": 0.9}, {"flatten": True, "flat_grads": "zeroed"}],
    ids=label,
)
def test_a_step_sends_its_rows_and_allocates_nothing(settings, device):
    """Adam's corrections are new at every step; the addresses are not, which stay where they are."""
    params = [torch.nn.Parameter(torch.ones(40, device=device)) for _ in range(5)]
    optimizer = fusedopt.AdamW(params, backend="triton", **settings)
    optimizer.zero_grad()
    for p in params:
        p.grad = torch.ones_like(p) if p.grad is None else p.grad
    for _ in range(3):
        optimizer.step()
    if device.type == "cuda":
        torch.cuda.synchronize()  # pinned memory is free again
    with Operations() as seen:
        optimizer.step()
    assert sorted(set(seen.names) - {"lift_fresh"}) == ["copy_"] and seen.names.count("copy_") == 1
    params[0].grad = torch.ones_like(params[0])
    with Operations() as seen:
        optimizer.step()
    assert seen.names.count("copy_") == 2


def test_as_many_rows_as_once_before_cost_no_memory(device, monkeypatch):
    """A GPU that is now so many, now so many steps behind."""
    behind = []
    monkeypatch.setattr(Skips, "listen", lambda self: None)
    monkeypatch.setattr(Skips, "variants", property(lambda self: behind.pop(0)))
    params = [torch.nn.Parameter(torch.ones(40, device=device)) for _ in range(5)]
    optimizer = fusedopt.AdamW(params, backend="triton", skip_nonfinite=True)
    for p in params:
        p.grad = torch.ones_like(p)
    for count in (1, 2, 3):
        behind[:] = [count] * 3  # the first step asks more than once
        optimizer.step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    for count in (3, 1, 2):
        behind[:] = [count]
        with Operations() as seen:
            optimizer.step()
        assert [name for name in seen.names if name != "lift_fresh"] == ["copy_"]
        assert len(optimizer._engine.executors[0].rows.table) == count


class RoundedLR(fusedopt.Adam):
    """Its formula knows numbers only."""

    def lr(self, group, t):
        return math.exp(math.log(group["lr"]))


class InPlaceLR(fusedopt.Adam):
    """Right for numbers, which nobody can write to."""

    def lr(self, group, t):
        lr = group["lr"]
        lr *= 0.5
        return 2 * lr


class InitialLR(fusedopt.Adam):
    """Reads what schedulers keep in a group."""

    def lr(self, group, t):
        return group["initial_lr"] * (group["lr"] / group.get("initial_lr", 1.0))


@pytest.mark.parametrize("cls", [RoundedLR, InPlaceLR, InitialLR])
def test_formulas_for_one_group_at_a_time(cls, device, monkeypatch):
    monkeypatch.setattr(cls, "add_param_group", with_initial_lr)
    optimizer = stepped(cls, {}, device)
    rates = [group["lr"] for group in optimizer.param_groups[: COUNT // 2]]
    rows = optimizer._engine.executors[0].rows
    assert not rows.joins
    assert rows.table[:, 0].tolist() == pytest.approx(rates)


def with_initial_lr(self, group):
    """As schedulers do."""
    super(type(self), self).add_param_group(group | {"initial_lr": group["lr"]})
