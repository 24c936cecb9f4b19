"""Parameter groups between steps: those with the same options are updated together, for as long as they have them."""

import numpy as np
import pytest
import torch
from cases import KINDS, every_kind
from pairs import Pair

import fusedopt


def in_own_groups(name, options=None):
    """Every parameter in a group of its own."""
    pair = Pair(name, options, groups=False)
    for attribute, cls, params in (("opt", type(pair.opt), pair.ours), ("oracle", type(pair.oracle), pair.theirs)):
        defaults = getattr(pair, attribute).defaults
        known = {key: value for key, value in defaults.items() if key not in ("foreach", "decoupled_weight_decay")}
        extra = {} if cls in fusedopt.registry.values() else {"foreach": False}
        setattr(pair, attribute, cls([{"params": [p]} for p in params], **known, **extra))
    return pair


def change(pair, changes):
    for number, options in changes.items():
        for optimizer in (pair.opt, pair.oracle):
            optimizer.param_groups[number].update(options)


def updated_together(optimizer):
    return [len(run.members) for executor in optimizer._engine.executors for run in executor.runs]


def takes_rates(pair):
    return pair.opt.rule(pair.opt.param_groups[0]).takes_rates


@every_kind
def test_groups_part_and_meet_again(name):
    pair = in_own_groups(name)
    count = len(pair.ours)
    pair.step(2)
    assert updated_together(pair.opt) == [count]
    # Some rules take a learning rate for each parameter.
    apart = not takes_rates(pair)
    usual = {key: pair.opt.param_groups[0][key] for key in ("lr", "weight_decay")}
    steps = [
        ({1: {"lr": 0.07}, 2: {"weight_decay": 0.3}}, 2 + apart),
        # As a scheduler does: others, but the same where they were.
        ({k: {"lr": 0.05 if k < 2 else 0.02} for k in range(count)}, 2 + apart),
        ({k: usual for k in range(count)}, 1),
    ]
    for changes, runs in steps:
        change(pair, changes)
        pair.step()
        # The numbers beside a step count follow their group's learning rates.
        assert len(updated_together(pair.opt)) == runs or name == "ASGD"
        pair.step()
        pair.check()


RATED = [("SGD", {}), ("RMSprop", {"momentum": 0.9}), ("RMSprop", {"centered": True})]


@pytest.mark.parametrize(("name", "options"), [(name, None) for name in KINDS] + RATED)
@pytest.mark.parametrize("weight_decay", [0, 0.1])
def test_groups_with_learning_rates_of_their_own(name, options, weight_decay):
    """As in layer-wise decay. Then one, which had its rate for itself, differs in more than that."""
    pair = in_own_groups(name, options)
    last = len(pair.ours) - 1
    change(pair, {k: {"lr": 0.02 + 0.001 * (k // 2), "weight_decay": weight_decay} for k in range(last + 1)})
    change(pair, {last: {"lr": 0.05}})
    rates = len({group["lr"] for group in pair.opt.param_groups})
    for runs in (1, 2):
        pair.step(2)
        assert len(updated_together(pair.opt)) == (runs if takes_rates(pair) else rates) or name == "ASGD"
        change(pair, {last: {"weight_decay": 0.2}})
    pair.step()
    pair.check()


@every_kind
def test_a_group_that_is_another_object(name):
    """Equal to the one before, until somebody writes to it."""
    pair = in_own_groups(name)
    pair.step(2)
    for optimizer in (pair.opt, pair.oracle):
        optimizer.param_groups[0] = dict(optimizer.param_groups[0])
    pair.step()
    change(pair, {0: {"lr": 0.0}})
    pair.step()
    pair.check()


@every_kind
def test_a_parameter_that_moves_to_its_neighbours_group(name):
    pair = Pair(name)
    pair.step(2)
    for optimizer in (pair.opt, pair.oracle):
        first, second = optimizer.param_groups
        first["weight_decay"] = 0.2
        second["params"].insert(0, first["params"].pop())
    pair.step(2)
    pair.check()


@pytest.mark.parametrize("kept", ["in a group", "in an attribute"])
def test_formulas_are_asked_where_something_changes_in_place(kept):
    """A list that somebody writes to is the same object, and of attributes no plan knows."""
    params = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]

    class Either(fusedopt.Adam):
        maximum = False

        def rule(self, group):
            return super().rule({**group, "amsgrad": group["amsgrad"][0] if kept == "in a group" else self.maximum})

    optimizer = Either(params, lr=0.1, amsgrad=[False])
    for amsgrad in (False, False, True):
        if kept == "in a group":
            optimizer.param_groups[0]["amsgrad"][0] = amsgrad
        else:
            optimizer.maximum = amsgrad
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
        assert ("max_exp_avg_sq" in optimizer.state[params[0]]) == amsgrad


def test_arrays_in_a_group_are_nobodys_business():
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = fusedopt.SGD([{"params": [p], "scales": np.ones(2)}], lr=0.1)
    for _ in range(3):
        p.grad = torch.ones(3)
        optimizer.step()
        optimizer.param_groups[0]["scales"] = np.ones(2)
    assert torch.allclose(p, torch.full((3,), 0.7))
