"""Plans made anew at every step, since other parameters have gradients: what happens to a parameter and its state while
no plan looks at them is noticed when its gradient comes back."""

import gc
import weakref

import pytest
import torch
from cases import interpreter_noise
from pairs import close

import fusedopt
from fusedopt import plan

SIZES = (3, 700, 20_000, 5, 64)
"""Gathered on a CPU, and not."""


def present(t, k):
    return (t + k) % 3 != 0


def double_a_state(optimizer, p):
    optimizer.state[p]["exp_avg"].mul_(2)


def replace_a_state(optimizer, p):
    optimizer.state[p]["exp_avg"] = torch.full_like(p, 0.5)


def replace_its_memory(optimizer, p):
    optimizer.state[p]["exp_avg_sq"].data = torch.full_like(p, 0.25)


def begin_again(optimizer, p):
    optimizer.state[p].clear()


def set_the_step(optimizer, p):
    optimizer.state[p]["step"].fill_(7)


def move_the_parameter(optimizer, p):
    p.data = p.data.clone()


def copy_all_states(optimizer, p):
    optimizer.load_state_dict(optimizer.state_dict())


ACTS = [None, double_a_state, replace_a_state, replace_its_memory, begin_again, set_the_step, move_the_parameter]
ACTS.append(copy_all_states)


@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize("act", ACTS, ids=lambda act: act.__name__ if act else "nothing")
def test_changes_are_noticed_when_the_gradient_comes_back(act, flatten, backend, device):
    sizes = SIZES if backend == "torch" else SIZES[:2]
    ours, theirs = ([torch.nn.Parameter(torch.ones(n, device=device)) for n in sizes] for _ in range(2))
    # A large eps, so that rounding errors of 1e-7 in the states stay such in the step.
    options = {"lr": 0.1, "eps": 1e-2, "weight_decay": 0.1}
    pair = fusedopt.AdamW(ours, **options, backend=backend, flatten=flatten), torch.optim.AdamW(theirs, **options)
    generator = torch.Generator().manual_seed(0)
    for t in range(9):
        grads = [torch.randn(n, generator=generator).to(device) for n in sizes]
        for params in (ours, theirs):
            for k, (p, g) in enumerate(zip(params, grads)):
                p.grad = g.clone() if present(t, k) else None
        for optimizer in pair:
            optimizer.step()
        if act is not None and t % 2:
            for optimizer, params in zip(pair, (ours, theirs)):
                for k, p in enumerate(params):
                    if not present(t, k) and optimizer.state[p]:
                        act(optimizer, p)
    # float32, 9 steps of 0.1.
    close([p.detach() for p in ours], [p.detach() for p in theirs], 1e-5)
    for p, q in zip(ours, theirs):
        close(
            [pair[0].state[p][key] for key in ("step", "exp_avg")],
            [pair[1].state[q][key] for key in ("step", "exp_avg")],
            1e-5,
        )


def test_numbers_of_their_own_tell_parameters_apart(backend, device, monkeypatch):
    """What somebody does to one parameter's ``mu_product``, with a gradient or without, is its own."""
    ours, theirs = ([torch.nn.Parameter(torch.ones(3, device=device)) for _ in range(4)] for _ in range(2))
    options = {"lr": 0.1, "weight_decay": 0.1}
    pair = fusedopt.NAdam(ours, **options, backend=backend), torch.optim.NAdam(theirs, **options)
    counted = Counted(monkeypatch)
    for t in range(9):
        for optimizer, params in zip(pair, (ours, theirs)):
            if t in (3, 5):
                optimizer.state[params[t - 3]]["mu_product"].mul_(0.1 * t)
            for k, p in enumerate(params):
                p.grad = torch.full_like(p, 1.0 + k - t % 3) if t == 0 or (k + t) % 4 else None
            optimizer.step()
    assert counted.count == 1
    # float32, 9 steps of 0.1.
    close([p.detach() for p in ours], [p.detach() for p in theirs], 1e-5)
    products = [[optimizer.state[p]["mu_product"] for p in ps] for optimizer, ps in zip(pair, (ours, theirs))]
    close(*products, 1e-6)
    assert len({float(x) for x in products[0]}) == 3


class Counted:
    """How often a whole plan was made while it was watched."""

    def __init__(self, monkeypatch):
        self.count = 0
        survey = plan.survey

        def counted(*args):
            self.count += 1
            return survey(*args)

        monkeypatch.setattr(plan, "survey", counted)


def trained(optimizer, params, seed, steps=14, absent=None):
    """Steps with random sets of gradients, after one with all."""
    generator = torch.Generator().manual_seed(seed)
    for t in range(steps):
        for k, p in enumerate(params):
            g = torch.randn(p.shape, generator=generator).to(p)
            here = t == 0 or (torch.rand((), generator=generator) < 0.6 if absent is None else k not in absent(t))
            p.grad = g if here else None
        for group in optimizer.param_groups:
            group["lr"] = 0.1 / (1 + t)
        optimizer.step()
        yield t


WAYS = [
    ("AdamW", {"weight_decay": 0.1}, {}),
    ("AdamW", {"weight_decay": 0.1}, {"flatten": True}),
    ("AdamW", {"amsgrad": True}, {"ema_decay": 0.9, "track": "parameters"}),
    ("SGD", {"momentum": 0.9, "dampening": 0.1}, {"skip_nonfinite": True}),
    ("SGD", {}, {"max_grad_value": 0.5}),
    ("RMSprop", {"centered": True}, {"cautious": True}),
    ("NAdam", {}, {"max_grad_norm": 1.0}),
    ("ASGD", {"t0": 2}, {"skip_nonfinite": True}),
    ("NAdam", {"capturable": True}, {"max_grad_norm": 1.0}),
    ("SGD", {"momentum": 0.9, "dampening": 0.1}, {"capturable": True, "skip_nonfinite": True}),
    ("AdamW", {}, {"master": "split", "state_dtype": "8bit"}),
    ("AdamW", {}, {"master": "stochastic", "state_dtype": torch.bfloat16, "max_grad_norm": 1.0}),
]


def numbers(optimizer):
    """All that a step leaves behind."""
    states = [state[key] for state in optimizer.state.values() for key in sorted(state)]
    norm = [] if optimizer.grad_norm is None else [optimizer.grad_norm]
    metrics = [] if optimizer.track is None else list(optimizer.metrics)
    return [x.double() for x in (*states, *optimizer._ema.values(), *norm, *metrics)]


@interpreter_noise
@pytest.mark.parametrize(("name", "options", "settings"), WAYS, ids=str)
def test_sets_that_are_put_together_equal_whole_plans(name, options, settings, backend, device, monkeypatch):
    """Two groups, random sets; another optimizer forgets its plan before every step. Where the fallback gathers
    gradients, or not, sums are taken in another order: roundings of float32."""
    if backend == "torch" and "capturable" in {**options, **settings}:
        pytest.skip("the fallback's step counts are the host's")
    sizes = [(3,), (4, 5), (7,), (20_000,), (5,), (4, 5), ()] if backend == "torch" else [(3,), (4, 5), (70,)]
    like = {"dtype": torch.bfloat16 if "master" in settings else torch.float32, "device": device}
    params, others = ([torch.nn.Parameter(torch.ones(size, **like)) for size in sizes] for _ in range(2))
    pair = []
    for ps in (params, others):
        groups = [{"params": ps[:2]}, {"params": ps[2:], "weight_decay": 0.05}]
        pair.append(fusedopt.registry[name](groups, **options, **settings, backend=backend))
    counted = Counted(monkeypatch)
    other = trained(pair[1], others, 1)
    for _ in trained(pair[0], params, 1):
        made = counted.count
        pair[1]._engine.forget()
        next(other)
        counted.count = made
        close([p.detach() for p in params], [p.detach() for p in others], 1e-5)
        close(numbers(pair[0]), numbers(pair[1]), 1e-5)
    assert counted.count == 1


def test_parameters_that_come_later_join_the_others(backend, device, monkeypatch):
    params = [torch.nn.Parameter(torch.ones(3, device=device)) for _ in range(6)]
    optimizer = fusedopt.AdamW(params, lr=0.1, max_grad_norm=1.0, backend=backend)
    counted = Counted(monkeypatch)
    sets = [{0, 1}, {1, 2}, {3, 4, 5}, {0, 5}, {2, 3}, {0, 1, 2, 3, 4, 5}, {4}]
    for t, (here, plans) in enumerate(zip(sets, (1, 2, 3, 3, 3, 3, 3))):
        for k, p in enumerate(params):
            p.grad = torch.ones_like(p) if k in here else None
        optimizer.step()
        assert counted.count == plans, t
    assert [float(optimizer.state[p]["step"]) for p in params] == [3, 3, 3, 3, 3, 3]


def average(optimizer, p):
    """The key of a state that is as large as its parameter."""
    return next(key for key in optimizer.state[p] if key.endswith(("_sq", "_avg")))


def replace_a_state_that_is_used(optimizer, params):
    optimizer.state[params[0]][average(optimizer, params[0])] = torch.full_like(params[0], 0.5)


def move_a_state(optimizer, params):
    optimizer.state[params[0]][average(optimizer, params[0])].data = torch.full_like(params[0], 0.25)


def replace_all_of_a_state(optimizer, params):
    optimizer.state[params[0]] = {key: 2 * value for key, value in optimizer.state[params[0]].items()}


def move_all(optimizer, params):
    for p in params:
        p.data = p.data.clone()


def load(optimizer, params):
    optimizer.load_state_dict(optimizer.state_dict())


def add(optimizer, params):
    params.append(torch.nn.Parameter(torch.ones_like(params[0])))
    optimizer.add_param_group({"params": [params[-1]]})


def delete_a_state(optimizer, params):
    del optimizer.state[params[1]][average(optimizer, params[1])]


def reset_all(optimizer, params):
    optimizer.state.clear()


def freeze_differently(optimizer, params):
    optimizer.param_groups[0]["params"].reverse()


LATER = [replace_a_state_that_is_used, move_a_state, replace_all_of_a_state, move_all, load, add, delete_a_state]
LATER += [reset_all, freeze_differently]


@pytest.mark.parametrize("act", LATER, ids=lambda act: act.__name__)
@pytest.mark.parametrize("cautious", [False, True])
def test_nothing_known_outlives_what_it_is_about(cautious, act, backend, device):
    """Another set and something else, both between the same two steps. The other optimizer begins anew every time.
    The fallback takes lists for one of the rules, and neighbours in memory for the other."""
    params, others = ([torch.nn.Parameter(torch.ones(3, device=device)) for _ in range(4)] for _ in range(2))
    pair = [fusedopt.AdamW(ps, lr=0.1, cautious=cautious, backend=backend) for ps in (params, others)]
    for t in range(9):
        if t == 5:
            for optimizer, ps in zip(pair, (params, others)):
                act(optimizer, ps)
        for k, p in [*enumerate(params), *enumerate(others)]:
            p.grad = torch.full_like(p, 1.0 + k - t % 3) if t == 0 or (k + t) % 4 else None
        pair[1]._engine.forget()
        for optimizer in pair:
            optimizer.step()
        close([p.detach() for p in params], [p.detach() for p in others], 1e-7)
    assert pair[0]._engine.roster is not None


def test_a_state_that_has_gone_is_not_made_by_looking(backend, device):
    params = [torch.nn.Parameter(torch.ones(3, device=device)) for _ in range(3)]
    optimizer = fusedopt.AdamW(params, lr=0.1, backend=backend)
    for absent in (None, 0, 1):
        for k, p in enumerate(params):
            p.grad = None if k == absent else torch.ones_like(p)
        if absent is not None:
            optimizer.state.pop(params[absent])
        optimizer.step()
        assert set(optimizer.state) == {p for p in params if p.grad is not None}


def test_a_set_that_stays_is_gathered_again(monkeypatch):
    """The fallback begins with lists; after a few steps it copies small gradients side by side, as at a first step."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    params = [torch.nn.Parameter(torch.ones(3)) for _ in range(40)]
    optimizer = fusedopt.AdamW(params, max_grad_norm=1.0, backend="torch")
    counted = Counted(monkeypatch)
    for t in range(9):
        for k, p in enumerate(params):
            p.grad = torch.ones_like(p) if t == 0 or k % 4 else None
        optimizer.step()
    assert counted.count == 2
    (executor,) = optimizer._engine.executors
    assert not executor.direct and not executor.bucket.passing


def test_no_set_is_kept(backend, device):
    """However many there were: one plan, and no gradient."""
    params = [torch.nn.Parameter(torch.ones(3, device=device)) for _ in range(5)]
    optimizer = fusedopt.AdamW(params, backend=backend)
    for _ in trained(optimizer, params, 0, steps=20):
        grads = [weakref.ref(p.grad) for p in params if p.grad is not None]
    optimizer.zero_grad()
    assert all(ref() is None for ref in grads)
    gc.collect()
    found = [x for x in gc.get_objects() if type(x) is plan.Plan and x.params[0] is params[0]]
    assert len(found) <= 2  # the one that is used, and the roster's


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("enabled", [False, True])
def test_what_is_planned_counts_as_old(enabled, frozen, monkeypatch):
    """Python need not search it for garbage soon. Whether it does, and what somebody else froze, stays as it was."""
    monkeypatch.setattr(plan, "MANY", 0)
    params = [torch.nn.Parameter(torch.ones(3)) for _ in range(5)]
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer = fusedopt.AdamW(params, backend="torch")
    was_enabled = gc.isenabled()
    try:
        (gc.enable if enabled else gc.disable)()
        if frozen:
            gc.freeze()
        optimizer.step()
        assert gc.isenabled() is enabled
        assert bool(gc.get_freeze_count()) is frozen
        old = any(x is optimizer._engine.plan for x in gc.get_objects(generation=2))
        assert old is (enabled and not frozen)
    finally:
        gc.unfreeze()
        (gc.enable if was_enabled else gc.disable)()
