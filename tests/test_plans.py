"""Plans made anew at every step, since other parameters have gradients: what happens to a parameter and its state while
no plan looks at them is noticed when its gradient comes back."""

import gc

import pytest
import torch
from pairs import close
from thinning import every_pair

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


@every_pair
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


@every_pair
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


def test_what_others_keep_in_the_state_is_theirs(backend, device):
    """They may change it at every step, and no plan is made anew."""
    params = [torch.nn.Parameter(torch.ones(n, device=device)) for n in SIZES[:2]]
    optimizer = fusedopt.AdamW(params, backend=backend)
    plans = set()
    for t in range(4):
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
        optimizer.state[params[1]]["mine"] = torch.tensor(float(t))
        plans.add(optimizer._engine.plan)
    assert len(plans) == 1


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("enabled", [False, True])
def test_what_is_planned_counts_as_old(enabled, frozen, monkeypatch):
    """Python need not search it for garbage soon. Whether it does, and what somebody else froze, stays as it was."""
    monkeypatch.setattr(plan, "MANY", 0)
    params = [torch.nn.Parameter(torch.ones(3)) for _ in range(5)]
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer = fusedopt.AdamW(params, backend="torch")
    was_enabled, was_frozen = gc.isenabled(), gc.get_freeze_count()
    gc.unfreeze()
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
        if was_frozen:
            gc.freeze()
        (gc.enable if was_enabled else gc.disable)()


@pytest.mark.parametrize("settings", [{}, {"max_grad_norm": 0.5}], ids=str)
@pytest.mark.parametrize("name", ["SGD", "AdamW", "RMSprop"])
def test_parameters_in_other_orders_may_move(name, settings):
    """Transposed ones and filters with channels last, small and large, go to torch's fused kernels as one dimension."""
    ours, theirs = ([], [])
    for params in (ours, theirs):
        for shape in ((40, 7), (300, 200)):
            params.append(torch.nn.Parameter(torch.ones(shape).t()))
        params.append(torch.nn.Parameter(torch.ones(8, 4, 3, 3).contiguous(memory_format=torch.channels_last)))
    pair = fusedopt.registry[name](ours, lr=0.1, **settings), getattr(torch.optim, name)(theirs, lr=0.1, foreach=False)
    generator = torch.Generator().manual_seed(0)
    for t in range(6):
        grads = [torch.randn(p.shape, generator=generator) for p in ours]
        for params in (ours, theirs):
            for k, (p, g) in enumerate(zip(params, grads)):
                p.grad = g.clone() if (k + t) % 2 else torch.empty_like(p).copy_(g)
        if settings:
            torch.nn.utils.clip_grad_norm_(theirs, 0.5)
        if t == 3:
            for p in ours:
                p.data = p.data.clone()
        for optimizer in pair:
            optimizer.step()
    # float32, 6 steps of 0.1.
    close([p.detach() for p in ours], [p.detach() for p in theirs], 1e-5)
    assert all(p.stride() == q.stride() for p, q in zip(ours, theirs))
