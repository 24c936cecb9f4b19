"""Steps at which other parameters have gradients than at the step before: plans that are put together from what is
known of each parameter do what whole plans do, and nothing is kept by set."""

import gc
import weakref

import pytest
import torch
from cases import interpreter_noise
from pairs import close

import fusedopt
from fusedopt import plan


class Counted:
    """How often a whole plan was made while it was watched."""

    def __init__(self, monkeypatch):
        self.count = 0
        survey = plan.survey

        def counted(*args):
            self.count += 1
            return survey(*args)

        monkeypatch.setattr(plan, "survey", counted)


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
    steps = 10 if backend == "torch" else 7
    other = trained(pair[1], others, 1, steps)
    for _ in trained(pair[0], params, 1, steps):
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


@pytest.mark.parametrize("left", [0, 1])
def test_no_parameter_is_kept_that_was_taken_out(left, backend, device):
    """Nor its states, from the next step on: who prunes, or frees a model beside its optimizer, wants the memory."""
    params = [torch.nn.Parameter(torch.ones(3, device=device)) for _ in range(5)]
    optimizer = fusedopt.AdamW(params, backend=backend)
    for _ in trained(optimizer, params, 0, steps=6):
        pass
    optimizer.zero_grad()
    gone = params[left:]
    kept = [weakref.ref(x) for p in gone for x in (p, optimizer.state.pop(p)["exp_avg"])]
    optimizer.param_groups[0]["params"] = params[:left]
    del gone, params[left:]
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    gc.collect()
    assert not any(ref() is not None for ref in kept)


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
