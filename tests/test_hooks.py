"""Hooks: each runs once, in torch's order, with torch's arguments; what it raises leaves the optimizer usable."""

import copy

import pytest
import torch
from cases import AFTER_LOADING, every_optimizer, every_optimizer_and_backend, give_gradients, model
from options import IN_TORCH, STATEFUL
from oracles import oracle_class
from pairs import Pair, assert_same, close, raised, snapshot
from thinning import every_pair
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import fusedopt


def both_classes(name):
    return fusedopt.registry[name], oracle_class(name)


@every_optimizer
@pytest.mark.parametrize("differentiable", [False, True], ids=["our step", "torch's own step"])
def test_step_hooks_in_torchs_order(name, differentiable):
    """Global before local ahead of the step, after them behind it; a removed hook is gone."""
    if differentiable and name not in IN_TORCH:
        pytest.skip("torch has no step for it")
    logs = []
    for cls in both_classes(name):
        log = []
        params = [p.detach().clone() for p in model("tiny")]
        optimizer, other = cls(params, **({"differentiable": True} if differentiable else {})), torch.optim.SGD(params)
        give_gradients(params, 5, plain=True)

        def note(text, log=log):
            return lambda optimizer, args, kwargs: log.append((text, len(args), list(kwargs)))

        def closure(log=log):
            log.append("closure")
            return 1.0

        handles = [
            register_optimizer_step_pre_hook(note("global pre")),
            register_optimizer_step_post_hook(note("global post")),
            optimizer.register_step_pre_hook(note("pre 1")),
            optimizer.register_step_pre_hook(note("pre 2")),
            optimizer.register_step_post_hook(note("post")),
        ]
        for call in (optimizer.step, lambda o=optimizer, c=closure: o.step(c), other.step):
            call()
        optimizer.step(closure=closure)
        for handle in handles:
            handle.remove()
            optimizer.step()
        logs.append(log)
    assert logs[0] == logs[1]
    assert logs[0][:5] == [(text, 1, []) for text in ("global pre", "pre 1", "pre 2", "post", "global post")]


@every_optimizer
def test_pre_hook_may_replace_the_arguments(name):
    results = []
    for cls in both_classes(name):
        optimizer = cls(model("tiny"))
        optimizer.register_step_pre_hook(lambda optimizer, args, kwargs: (args, {"closure": lambda: 7.0}))
        assert optimizer.step() == 7.0
        handle = optimizer.register_step_pre_hook(lambda optimizer, args, kwargs: "nonsense")
        error = raised(optimizer.step)
        # The words before it name the function.
        results.append((type(error), str(error).split("must return")[-1]))
        handle.remove()
        assert optimizer.step() == 7.0
    assert results[0] == results[1]


@every_pair
@every_optimizer_and_backend
@pytest.mark.parametrize("moment", ["closure", "pre", "post", "global pre", "global post"])
def test_what_raises_leaves_the_optimizer_usable(name, moment, backend, device):
    """The same exception as of the user; training goes on as in torch."""
    pair = Pair(name, None, "tiny", device=device, groups=False, backend=backend)
    pair.step(2)

    def broken(*args):
        raise KeyError("of the user")

    for optimizer, params in ((pair.opt, pair.ours), (pair.oracle, pair.theirs)):
        give_gradients(params, 7, plain=True)
        register = {
            "pre": optimizer.register_step_pre_hook,
            "post": optimizer.register_step_post_hook,
            "global pre": register_optimizer_step_pre_hook,
            "global post": register_optimizer_step_post_hook,
        }
        handle = register[moment](broken) if moment in register else None
        with pytest.raises(KeyError, match="of the user"):
            optimizer.step(broken if moment == "closure" else None)
        if handle is not None:
            handle.remove()
        assert torch.is_grad_enabled()
    pair.check()
    pair.step(2)
    pair.check()


@every_optimizer
def test_state_dict_hooks(name):
    """Before and after, in order, ``prepend`` and a replaced result included."""
    results = []
    for cls in both_classes(name):
        params = model("tiny")
        optimizer = cls(params)
        give_gradients(params, 5, plain=True)
        optimizer.step()
        log = []
        optimizer.register_state_dict_pre_hook(lambda o: o.state.__setitem__("test", 1))
        optimizer.register_state_dict_pre_hook(lambda o, log=log: log.append("test" in o.state), prepend=True)
        optimizer.register_state_dict_post_hook(lambda o, saved: {**saved, "extra": saved["state"].pop("test")})
        optimizer.register_state_dict_post_hook(lambda o, saved, log=log: log.append("extra" in saved), prepend=True)
        saved = optimizer.state_dict()
        results.append((log, list(saved), saved["extra"], list(saved["state"])))
    assert results[0] == results[1]
    assert results[0][0] == [False, False]


@every_optimizer
def test_load_state_dict_hooks(name):
    """A hook may change what is loaded, in place or by returning another; those after it see that."""
    results = []
    for cls in both_classes(name):
        params = model("tiny")
        optimizer = cls(params, lr=0.5)
        give_gradients(params, 5, plain=True)
        optimizer.step()
        saved = optimizer.state_dict()
        log = []

        def in_place(optimizer, state_dict):
            state_dict["param_groups"][0]["lr"] = 0.25

        def replaced(optimizer, state_dict, log=log):
            log.append(state_dict["param_groups"][0]["lr"])
            state_dict = copy.deepcopy(state_dict)
            state_dict["param_groups"][0]["lr"] = 0.125
            return state_dict

        def after(optimizer, log=log):
            log.append(("after", optimizer.param_groups[0]["lr"], len(optimizer.state)))

        optimizer.register_load_state_dict_pre_hook(replaced)
        optimizer.register_load_state_dict_post_hook(after)
        optimizer.load_state_dict(saved)
        optimizer.register_load_state_dict_pre_hook(in_place, prepend=True)
        optimizer.load_state_dict(saved)
        results.append((log, optimizer.param_groups[0]["lr"]))
    assert results[0] == results[1]
    assert [entry for entry in results[0][0] if isinstance(entry, float)] == [0.5, 0.25]


@every_optimizer_and_backend
def test_hook_that_repairs_a_checkpoint(name, backend, device):
    """What does not fit may be made to fit by a hook, as in torch: names instead of numbers, another group count."""
    pair = Pair(name, None, "tiny", device=device, backend=backend)
    pair.step(3)
    kept = copy.deepcopy(pair.opt.state_dict())
    foreign = {"mine": kept}
    fresh = model("tiny", device=device)
    with torch.no_grad():
        for p, q in zip(fresh, pair.ours):
            p.copy_(q)
    middle = len(fresh) // 2
    groups = [{"params": fresh[:middle]}, {"params": fresh[middle:]}]
    optimizer = fusedopt.registry[name](groups, **STATEFUL[name], backend=backend)
    handle = optimizer.register_load_state_dict_pre_hook(lambda o, state_dict: state_dict["mine"])
    optimizer.load_state_dict(foreign)
    handle.remove()
    for number in (7, 8):
        give_gradients(fresh, number)
        optimizer.step()
    pair.step(2)
    close(fresh, pair.theirs, 1e-12)


@every_optimizer
def test_hook_that_raises_while_loading(name):
    """Before: nothing was loaded. After: everything was, as in torch."""
    pair = Pair(name, None, "tiny", groups=False)
    pair.step(3)
    saved = copy.deepcopy(pair.opt.state_dict())
    pair.step()

    def broken(*args):
        raise KeyError("of the user")

    before = snapshot(pair.opt)
    handle = pair.opt.register_load_state_dict_pre_hook(broken)
    with pytest.raises(KeyError, match="of the user"):
        pair.opt.load_state_dict(saved)
    handle.remove()
    assert_same(before, snapshot(pair.opt))
    pair.oracle.load_state_dict(copy.deepcopy(saved))
    handle = pair.opt.register_load_state_dict_post_hook(broken)
    with pytest.raises(KeyError, match="of the user"):
        pair.opt.load_state_dict(saved)
    handle.remove()
    pair.step(2)
    pair.check(AFTER_LOADING[name])


def test_hooks_registered_by_the_closure_run_at_this_step():
    for cls in (fusedopt.SGD, torch.optim.SGD):
        p, ran = torch.nn.Parameter(torch.ones(3)), []
        optimizer = cls([p], lr=0.1)

        def closure(optimizer=optimizer, ran=ran):
            optimizer.register_step_post_hook(lambda *args: ran.append(1))
            return 1.0

        optimizer.step(closure)
        assert ran == [1]
