"""Checkpoints that do not fit: an error names the entry and nothing has changed. What torch works with is taken."""

import copy
import math

import pytest
import torch
from broken_checkpoints import OF_GROUPS, OF_STATES, OF_STEPS, missing_tensor
from cases import AFTER_LOADING, KINDS, every_optimizer, every_optimizer_and_backend, give_gradients, model
from options import IN_TORCH, LR, STATEFUL
from oracles import oracle_class
from pairs import Pair, assert_same, close, close_states, raised, snapshot
from thinning import ALL

import fusedopt


def exactly(optimizer):
    """All of an optimizer: bits, and the objects themselves."""
    groups = [(id(group), list(map(id, group["params"]))) for group in optimizer.param_groups]
    states = [(id(p), id(state), [(key, id(s)) for key, s in state.items()]) for p, state in optimizer.state.items()]
    hooks = {key: dict(value) for key, value in vars(optimizer).items() if key.endswith("_hooks")}
    return (id(optimizer.param_groups), groups, id(optimizer.state), states, hooks)


@every_optimizer_and_backend
def test_what_does_not_fit_is_refused(name, backend, device):
    """Between two steps: torch's optimizer beside it, which never saw the attempts, stays equal."""
    pair = Pair(name, None, "tiny", device=device, backend=backend, max_grad_norm=3.0)
    pair.opt.register_load_state_dict_pre_hook(lambda optimizer, state_dict: None)
    pair.step(3)
    good = pair.opt.state_dict()
    counted = "step" in good["state"][1]
    # SGD makes its buffer at a parameter's first step: without one it is at its first step.
    breakages = [b for b in OF_GROUPS + OF_STATES + counted * OF_STEPS if counted or b is not missing_tensor]
    before, objects = snapshot(pair.opt), exactly(pair.opt)
    for breakage in breakages:
        bad = copy.deepcopy(good)
        error, message = breakage(bad)
        with pytest.raises(error, match=message):
            pair.opt.load_state_dict(bad)
        assert_same(before, snapshot(pair.opt))
        assert exactly(pair.opt) == objects, breakage.__name__
    for nothing in (None, [], "checkpoint.pt"):
        with pytest.raises(TypeError, match="a state_dict is a dict"):
            pair.opt.load_state_dict(nothing)
    pair.step(2)
    pair.check()


def test_the_message_knows_the_names_of_parameters():
    module = torch.nn.Linear(3, 2)
    optimizer = fusedopt.Adam(module.named_parameters())
    module(torch.ones(3)).sum().backward()
    optimizer.step()
    bad = copy.deepcopy(optimizer.state_dict())
    bad["state"][1]["exp_avg_sq"] = torch.zeros(7)
    with pytest.raises(ValueError, match=r"\['state'\]\[1\] \(parameter 1 of group 0, 'bias'\)\['exp_avg_sq'\]"):
        optimizer.load_state_dict(bad)


def after_loading(name, saved, **options):
    """(optimizer's class, what loading and two steps with it raise, parameters) for ours and torch's."""
    for cls in (fusedopt.registry[name], oracle_class(name)):
        params = model("tiny")
        middle = len(params) // 2
        groups = [{"params": params[:middle]}, {"params": params[middle:]}]
        for_loop = {"foreach": False} if name in IN_TORCH else {}
        optimizer = cls(groups, lr=LR, **(options or STATEFUL[name]), **for_loop)
        before = exactly(optimizer)

        def attempt(optimizer=optimizer, params=params, cls=cls):
            optimizer.load_state_dict(copy.deepcopy(saved))
            for number in (5, 6):
                give_gradients(params, number, plain=True)
                optimizer.step()

        error = raised(attempt)
        yield error, params, exactly(optimizer) == before


@pytest.mark.parametrize("source", IN_TORCH if ALL else KINDS)
@every_optimizer
def test_of_another_class(name, source):
    """Where torch's optimizer cannot take another step, loading is refused; where it can, ours does the same."""
    if name not in IN_TORCH:
        return
    for options in ({}, STATEFUL[source]):
        pair = Pair(source, options, "tiny", start=4)
        pair.step(2)
        (error, params, unchanged), (torch_error, torch_params, _) = after_loading(name, pair.oracle.state_dict())
        if torch_error is None:
            assert error is None
            close(params, torch_params, AFTER_LOADING[source])
        else:
            assert isinstance(error, ValueError)
            assert "state_dict[" in str(error)
            assert unchanged


def foreign_keys(saved):
    saved["version"] = 7
    saved["state"]["test"] = {"mine": 1}
    saved["state"][99] = {"step": 1}
    for state in saved["state"].values():
        state.update(more=torch.ones(3), text=None)
    for group in saved["param_groups"]:
        group.update(initial_lr=0.1, layer="first")


def states_of_some(saved):
    for k in (0, 2, 3):
        del saved["state"][k]
    saved["state"][1] = saved["state"].pop(1)


def empty_states(saved):
    saved["state"] = {k: {} for k in saved["state"]}


def no_states(saved):
    saved["state"] = {}


def other_numbers(saved):
    """Any hashable key may stand for a parameter."""
    names = "abcde"
    saved["state"] = {names[k]: state for k, state in saved["state"].items()}
    for group in saved["param_groups"]:
        group["params"] = [names[k] for k in group["params"]]


def tensor_lr(saved):
    for group in saved["param_groups"]:
        group["lr"] = torch.tensor(float(group["lr"]), dtype=torch.float64)


def lists_for_tuples(saved):
    for group in saved["param_groups"]:
        group.update({key: list(value) for key, value in group.items() if isinstance(value, tuple)})


def other_dtypes(saved):
    """torch makes the states those of the parameter's dtype, but not the steps."""
    for state in saved["state"].values():
        state.update({key: s.to(torch.float64) for key, s in state.items() if isinstance(s, torch.Tensor)})


def changed_numbers(saved):
    saved["param_groups"][0].update(lr=0.2, weight_decay=0.3)
    saved["param_groups"][1].update(lr=0.0, weight_decay=0.0)


ACCEPTED = [
    foreign_keys, states_of_some, empty_states, no_states, other_numbers, tensor_lr, lists_for_tuples, other_dtypes,
    changed_numbers,
]  # fmt: skip


@pytest.mark.parametrize("change", ACCEPTED)
@every_optimizer
def test_what_torch_accepts_and_works_with(name, change):
    pair = Pair(name, None, "tiny")
    pair.step(3)
    saved = copy.deepcopy(pair.oracle.state_dict())
    change(saved)
    (error, params, unchanged), (torch_error, torch_params, _) = after_loading(name, saved)
    if (name, change) == ("Adagrad", empty_states):
        # torch's class wants a step in every state, and notices in the midst of loading.
        assert isinstance(torch_error, KeyError)
        assert isinstance(error, ValueError)
        assert unchanged
        return
    assert torch_error is None
    assert error is None
    close(params, torch_params, AFTER_LOADING[name])


@every_optimizer_and_backend
def test_loaded_before_the_first_step(name, backend, device):
    """And before there is any gradient, into parameters that get theirs later."""
    pair = Pair(name, None, "tiny", device=device, backend=backend)
    pair.step(3)
    fresh = Pair(name, None, "tiny", device=device, backend=backend, start=7)
    with torch.no_grad():
        for p, q in zip(fresh.ours + fresh.theirs, pair.ours + pair.theirs):
            p.copy_(q)
    fresh.opt.load_state_dict(copy.deepcopy(pair.oracle.state_dict()))
    fresh.oracle.load_state_dict(copy.deepcopy(pair.oracle.state_dict()))
    # Saved again at once, it is what was loaded.
    close_states(fresh.opt, pair.oracle, 0)
    for params in (fresh.ours, fresh.theirs):
        give_gradients(params, 7, plain=True)
        params[1].grad = None
    fresh.opt.step()
    torch.nn.utils.clip_grad_norm_(fresh.theirs, math.inf)
    fresh.oracle.step()
    fresh.number = 8
    fresh.step(2)
    fresh.check(AFTER_LOADING[name])


def test_checkpoints_of_subclasses():
    """With options and states of their own, which only they read."""

    class Mine(torch.optim.AdamW):
        def __init__(self, params, layer="first", **options):
            super().__init__(params, **options)
            for group in self.param_groups:
                group["layer"] = layer

    params = model("tiny")
    theirs = Mine(params, lr=LR)
    give_gradients(params, 5, plain=True)
    theirs.step()
    for p in params:
        theirs.state[p]["previous"] = torch.zeros(3)
    optimizer = fusedopt.AdamW([torch.nn.Parameter(p.detach().clone()) for p in params])
    optimizer.load_state_dict(theirs.state_dict())
    assert optimizer.param_groups[0]["layer"] == "first"
    give_gradients(optimizer.param_groups[0]["params"], 6, plain=True)
    give_gradients(params, 6, plain=True)
    optimizer.step()
    theirs.step()
    close(optimizer.param_groups[0]["params"], params, 1e-12)
    assert list(optimizer.state_dict()["state"][1]) == list(theirs.state_dict()["state"][1])


def test_lazy_parameters_take_their_state_before_their_shape():
    results = []
    for cls in (fusedopt.SGD, torch.optim.SGD):
        saved = cls([torch.nn.Parameter(torch.ones(2, 3))], lr=0.1, momentum=0.9)
        saved.param_groups[0]["params"][0].grad = torch.ones(2, 3)
        saved.step()
        module = torch.nn.LazyLinear(2, bias=False)
        optimizer = cls(module.parameters(), lr=0.1, momentum=0.9)
        optimizer.load_state_dict(saved.state_dict())
        module(torch.ones(1, 3)).sum().backward()
        with torch.no_grad():
            module.weight.fill_(1.0)
        optimizer.step()
        results.append(module.weight)
    close(*([result] for result in results), 1e-6)
