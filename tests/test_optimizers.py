"""The optimizer protocol: classes, groups, hooks, closures, schedulers and scalers behave as torch.optim's."""

import inspect

import pytest
import torch
from cases import every_optimizer, every_optimizer_and_backend, every_torch_optimizer, give_gradients, kinds, model
from options import LR, OPTIONS
from oracles import oracle_class
from pairs import Pair
from thinning import every_pair
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import fusedopt


@every_torch_optimizer
def test_class_is_a_subclass_of_torchs(name):
    ours, theirs = fusedopt.registry[name], getattr(torch.optim, name)
    optimizer = ours(model())
    assert isinstance(optimizer, theirs)
    assert ours.__name__ == theirs.__name__ == name
    assert optimizer.defaults == theirs(model()).defaults
    parameters, expected = (list(inspect.signature(cls).parameters.values()) for cls in (ours, theirs))
    assert parameters[: len(expected)] == expected
    added = parameters[len(expected) :]
    assert [p.name for p in added] == list(ours.settings_class.fields())
    assert all(p.kind is p.KEYWORD_ONLY for p in added)


def test_positional_arguments():
    ours, theirs = (cls(model(), 0.1, 0.9, 0.0, 0.01, True) for cls in (fusedopt.SGD, torch.optim.SGD))
    assert ours.defaults == theirs.defaults


@every_optimizer
def test_the_constructor_has_the_signature_of_its_class(name):
    """Programs that make command lines or forms of arguments ask the one or the other."""
    cls = fusedopt.registry[name]
    own, *parameters = inspect.signature(cls.__init__).parameters.values()
    assert (own.name, parameters) == ("self", list(inspect.signature(cls).parameters.values()))
    assert name in cls.__init__.__qualname__


def test_subclasses_of_users_keep_their_signature_and_stay_out_of_the_registry():
    before = dict(fusedopt.registry)

    class Mine(fusedopt.Adam):
        """My own."""

        def __init__(self, params, size, power=2):
            super().__init__(params, lr=size**power)

    class Plain(fusedopt.SGD):
        pass

    assert fusedopt.registry == before
    assert list(inspect.signature(Mine).parameters) == ["params", "size", "power"]
    assert inspect.signature(Plain) == inspect.signature(fusedopt.SGD)
    assert Mine(model(), 0.1).param_groups[0]["lr"] == 0.1**2
    assert Mine.__doc__ == "My own."


def test_groups_with_different_formulas(backend, device):
    """Groups that need different states and rules: one bucket each."""
    options = {
        "SGD": [{}, {"momentum": 0.9}, {"momentum": 0.5, "nesterov": True}, {"momentum": 0.5, "dampening": 0.5}],
        "RMSprop": [{}, {"centered": True}, {"momentum": 0.9}, {"momentum": 0.9, "centered": True}],
        "Adam": [{}, {"amsgrad": True}, {"betas": (0.5, 0.5)}, {"maximize": True}],
    }
    for name, groups in options.items():
        pair = Pair(name, {}, "small", device=device, groups=False, backend=backend, max_grad_norm=5.0)
        for optimizer in (pair.opt, pair.oracle):
            params = optimizer.param_groups.pop()["params"]
            for k, group in enumerate(groups):
                optimizer.add_param_group({"params": params[k::4], **group})
        pair.step(4)
        pair.check()


@every_optimizer_and_backend
def test_options_changed_in_mid_training(name, backend, device):
    """Every option set after the other, on one optimizer that has all states from the beginning."""
    for kind in kinds(backend, device):
        pair = Pair(name, None, kind, device=device, groups=False, backend=backend)
        pair.step()
        defaults = {**pair.oracle.defaults, "lr": LR}
        for options in OPTIONS[name]:
            if options.get("alpha", 0.9) != 0.9:
                continue  # v would fall below the square of an average that only `centered` keeps up to date: NaN
            for optimizer in (pair.opt, pair.oracle):
                optimizer.param_groups[0].update({**defaults, **options, "foreach": False})
            pair.step()
            pair.check()


@every_pair
@every_optimizer_and_backend
@pytest.mark.parametrize("flatten", [False, True])
def test_add_param_group_in_mid_training(name, flatten, backend, device):
    pair = Pair(name, None, "tiny", device=device, backend=backend, flatten=flatten)
    pair.step(2)
    for optimizer, params in ((pair.opt, pair.ours), (pair.oracle, pair.theirs)):
        newcomers = model("tiny", device=device)
        optimizer.add_param_group({"params": newcomers, "lr": 0.01})
        params += newcomers
    pair.step(3)
    pair.check()


@every_optimizer
def test_groups_removed_reordered_emptied_and_replaced(name, device):
    pair = Pair(name, device=device)
    optimizers = (pair.opt, pair.oracle)
    pair.step(2)
    for optimizer in optimizers:
        optimizer.param_groups.reverse()
    pair.step()
    pair.check()
    for optimizer in optimizers:
        # Objects of their own: the same numbers, and one that changes.
        optimizer.param_groups = [dict(group) for group in optimizer.param_groups]
        optimizer.param_groups[0]["lr"] = 0.5
    pair.step()
    pair.check()
    removed = [optimizer.param_groups.pop() for optimizer in optimizers]
    pair.step()
    for optimizer, group in zip(optimizers, removed):
        optimizer.param_groups.append(group)
        optimizer.param_groups[0]["params"] = []
    pair.step()
    for ours, theirs in zip(pair.ours, pair.theirs):
        # Same seeds, and a dozen roundings: Pair.check, whose state_dict cannot hold what stands in no group.
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@every_optimizer_and_backend
def test_empty_groups(name, backend, device):
    params = [model("tiny", device=device) for _ in range(2)]
    for cls, its, extra in ((fusedopt.registry[name], params[0], {"backend": backend}), (None, params[1], {})):
        optimizer = (cls or oracle_class(name))([{"params": []}, {"params": its}, {"params": []}], **extra)
        give_gradients(its, 0)
        optimizer.step()
    for ours, theirs in zip(*params):
        # One step in float64.
        torch.testing.assert_close(ours, theirs, rtol=1e-14, atol=1e-14)


def test_nothing_to_do(backend, device):
    params = model("tiny", device=device)
    optimizer = fusedopt.Adam(params, backend=backend, max_grad_norm=1.0, skip_nonfinite=True)
    optimizer.step()
    assert optimizer.grad_norm == 0
    assert len(optimizer.state) == 0


@every_optimizer
def test_named_parameters(name):
    module = torch.nn.Linear(3, 2)
    optimizer = fusedopt.registry[name](module.named_parameters())
    assert optimizer.param_groups[0]["param_names"] == ["weight", "bias"]
    module(torch.ones(3)).sum().backward()
    optimizer.step()
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == ["weight", "bias"]


@pytest.mark.parametrize("sparse", [False, True], ids=["fused", "torch's own step"])
@pytest.mark.parametrize("name", ["SGD", "Adagrad"])
def test_hooks_run_once(name, sparse):
    calls = []
    embedding = torch.nn.Embedding(4, 3, sparse=sparse)
    optimizer = fusedopt.registry[name](embedding.parameters())

    def note(text):
        return lambda *args: calls.append((text, args[0] is optimizer))

    handles = [
        optimizer.register_step_pre_hook(note("pre")),
        optimizer.register_step_post_hook(note("post")),
        register_optimizer_step_pre_hook(note("global pre")),
        register_optimizer_step_post_hook(note("global post")),
        optimizer.register_state_dict_pre_hook(note("save pre")),
        optimizer.register_state_dict_post_hook(note("save post")),
        optimizer.register_load_state_dict_pre_hook(note("load pre")),
        optimizer.register_load_state_dict_post_hook(note("load post")),
    ]
    embedding(torch.tensor([0, 2])).sum().backward()
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    for handle in handles:
        handle.remove()
    optimizer.step()
    expected = ["global pre", "pre", "post", "global post", "save pre", "save post", "load pre", "load post"]
    assert calls == [(text, True) for text in expected]


def test_pre_hook_may_change_gradients_and_state(backend, device):
    params = model("tiny", device=device)
    optimizer = fusedopt.Adam(params, backend=backend)
    give_gradients(params, 4)
    optimizer.step()
    before = [p.detach().clone() for p in params]

    def hook(optimizer, args, kwargs):
        for p in params:
            p.grad = None

    optimizer.register_step_pre_hook(hook)
    give_gradients(params, 5)
    optimizer.step()
    assert all(map(torch.equal, params, before))
