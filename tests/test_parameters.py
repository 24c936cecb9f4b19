"""Parameters and gradients as users treat them: moved, tied, frozen, sparse, complex, kept or let go."""

import math
import weakref
from itertools import product

import pytest
import torch
from cases import (
    every_optimizer,
    every_optimizer_and_backend,
    give_gradients,
    interpreter_noise,
    kinds,
    model,
    options_and_backends,
    stands_for_all,
)
from options import IN_TORCH
from pairs import Pair, both, close, same_bits
from thinning import every_pair, every_pair_but

import fusedopt

flat_or_not = pytest.mark.parametrize("flatten", [False, True], ids=["in place", "flatten"])


@every_pair_but("flatten")
@every_optimizer_and_backend
@flat_or_not
def test_data_replaced_between_steps(name, flatten, backend, device):
    changes = [
        lambda p: p.clone(),
        lambda p: p.t() if p.dim() == 2 and p.shape[0] == p.shape[1] else p,  # the same address
        lambda p: p.contiguous(),
        lambda p: p.t().contiguous().t() if p.dim() == 2 else p * 2,
    ]
    for kind in kinds(backend, device):
        pair = Pair(name, None, kind, device=device, backend=backend, flatten=flatten)
        for optimizer, params in ((pair.opt, pair.ours), (pair.oracle, pair.theirs)):
            square = torch.nn.Parameter(torch.ones(4, 4, dtype=torch.float64, device=device))
            optimizer.add_param_group({"params": [square]})
            params.append(square)
        pair.step()
        for change in changes:
            for params in (pair.ours, pair.theirs):
                for p in params:
                    p.data = change(p.data)
            pair.step()
            pair.check()


@pytest.mark.parametrize("count", [1, 12])
def test_another_dtype_at_the_same_address(count, device):
    """16 bits read as another format: nothing but the dtype tells."""
    params = [torch.nn.Parameter(torch.ones(8, dtype=torch.float16, device=device)) for _ in range(count)]
    optimizer = fusedopt.SGD(params, lr=0.5)
    for dtype in (torch.float16, torch.bfloat16):
        for p in params:
            p.grad = None
            p.data = p.data.view(dtype).fill_(1.0)
            p.grad = torch.ones_like(p)
        optimizer.step()
        assert all(p.dtype is dtype and (p == 0.5).all() for p in params)


LAYOUTS = {
    "longer": (lambda p: torch.ones(12, device=p.device), "has shape"),
    "float64": (lambda p: p.double(), None),
    "every other": (lambda p: torch.full((16,), 0.5, device=p.device)[::2], None),
}


@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("change", LAYOUTS)
def test_memory_of_another_layout_beside_the_old_gradient(change, frozen, flatten, backend, device):
    """Without a look at it, elements would be updated that are not there. A frozen parameter with a gradient is one
    that torch's guards do not know."""
    to, error = LAYOUTS[change]
    params = [torch.nn.Parameter(torch.ones(8, device=device)) for _ in range(12)]
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer = fusedopt.SGD(params, lr=0.25, flatten=flatten, backend=backend)
    optimizer.step()
    for p in params:
        p.requires_grad_(not frozen)
    optimizer.step()
    last = params[-1]
    last.data = to(last.data)
    if error is None:
        optimizer.step()
        assert all((p == 0.25).all() for p in params)
        return
    with pytest.raises(RuntimeError, match=error):
        optimizer.step()
    assert all((p == 0.5).all() for p in params[:-1])


@every_pair
@every_optimizer
@flat_or_not
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["double", "bfloat16"])
def test_module_converted_between_steps(name, flatten, dtype, device):
    """``module.double()`` and ``module.bfloat16()`` keep the Parameters and replace their memory."""
    single = Pair(name, {}, "small", torch.float32, device, flatten=flatten)
    exact = Pair(name, {}, "small", torch.float64, device)
    for pair in (single, exact):
        pair.step(3)
    for p in single.ours:
        p.grad = None
        p.data = p.data.to(dtype)
    for _ in range(3):
        give_gradients(single.ours, exact.number)
        single.opt.step()
        exact.step()
    assert all(p.dtype is dtype for p in single.ours)
    # The states stay float32; bfloat16 rounds at 2^-9 of values below 4, four times.
    close([p.double() for p in single.ours], exact.ours, 1e-5 if dtype is torch.float64 else 0.05)


@flat_or_not
@pytest.mark.parametrize("assign", [False, True])
def test_module_loads_a_state_dict(flatten, assign):
    def build():
        torch.manual_seed(0)
        return torch.nn.Sequential(*[torch.nn.Linear(5, 5) for _ in range(6)]).double()

    pairs = both("Adam", build, flatten=flatten)
    loaded = {key: value + 1 for key, value in build().state_dict().items()}
    for module, optimizer in pairs:
        for number in range(4):
            if number == 2:
                module.load_state_dict({key: value.clone() for key, value in loaded.items()}, assign=assign)
            optimizer.zero_grad()
            module(torch.ones(5, dtype=torch.float64)).sum().backward()
            optimizer.step()
    # With assign=True the module has Parameters that no optimizer knows, in torch as here.
    close(pairs[0][0].parameters(), pairs[1][0].parameters(), 1e-12)
    assert torch.equal(pairs[0][0][0].weight, loaded["0.weight"]) == assign


@every_optimizer
@flat_or_not
def test_tied_parameters(name, flatten):
    """One Parameter in two places of a model, and two Parameters over one memory."""

    def build():
        torch.manual_seed(0)
        module = torch.nn.Sequential(*[torch.nn.Linear(5, 5) for _ in range(8)]).double()
        module[1].weight = module[0].weight
        module[3].weight.data = module[2].weight.data
        return module

    pairs = both(name, build, flatten=flatten)
    for module, optimizer in pairs:
        for _ in range(3):
            optimizer.zero_grad()
            module(torch.ones(5, dtype=torch.float64)).sum().backward()
            optimizer.step()
    module = pairs[0][0]
    assert module[0].weight is module[1].weight
    assert module[3].weight.data_ptr() == module[2].weight.data_ptr()
    close(module.parameters(), pairs[1][0].parameters(), 1e-12)


@every_pair
@every_optimizer_and_backend
@flat_or_not
def test_frozen_then_unfrozen(name, flatten, backend, device):
    pair = Pair(name, None, "tiny", device=device, backend=backend, flatten=flatten)
    optimizers = ((pair.opt, pair.ours), (pair.oracle, pair.theirs))
    pair.step(2)
    for optimizer, params in optimizers:
        params[1].requires_grad_(False)
        frozen = params[1].detach().clone()
        for number in (6, 7):
            give_gradients(params, number, plain=True)
            params[1].grad = None
            optimizer.step()
        assert torch.equal(params[1], frozen)
        params[1].requires_grad_(True)
    pair.number = 8
    pair.step(2)
    pair.check()


@every_optimizer_and_backend
def test_two_optimizers_over_the_same_parameters(name, backend, device):
    pair = Pair(name, None, "tiny", device=device, groups=False, backend=backend)
    others = fusedopt.SGD(pair.ours, lr=0.1, backend=backend), torch.optim.SGD(pair.theirs, lr=0.1, foreach=False)
    for _ in range(3):
        pair.step()
        for optimizer in others:
            optimizer.step()
    pair.check()


@interpreter_noise
@options_and_backends(lambda name, options: options == {}, stands_for_all)
def test_gradients_are_left_alone_without_clipping(name, options, backend, device):
    """The kernels have no way to write to gradients."""
    for kind in kinds(backend, device):
        params = model(kind, torch.float32, device)
        optimizer = fusedopt.registry[name](params, backend=backend, **options)
        values = [0.0, 1e-42, math.nan]
        if (name, backend, device.type) != ("RMSprop", "torch", "cpu"):
            # torch's kernel, used as RMSprop, writes the gradient back: README, "Honest limits".
            values += [-0.0, math.inf]
        for number, bad in enumerate(values):
            give_gradients(params, number, plain=True)
            for p in params:
                if p.grad is not None and p.grad.numel():
                    p.grad.view(-1)[0] = bad
            grads = [p.grad for p in params]
            kept = [g if g is None else (g.clone(), g._version) for g in grads]
            optimizer.step()
            assert all(p.grad is g for p, g in zip(params, grads))
            for g, copy in zip(grads, kept):
                assert g is None or (same_bits(g, copy[0]) and g._version == copy[1])


@every_optimizer_and_backend
@flat_or_not
def test_autograd_sees_that_parameters_changed(name, flatten, backend, device):
    for kind in kinds(backend, device):
        params = model(kind, device=device)
        optimizer = fusedopt.registry[name](params, backend=backend, flatten=flatten)
        for number in range(5, 8):
            give_gradients(params, number)
            versions = [p._version for p in params]
            optimizer.step()
            stepped = [p.grad is not None for p in params]
            assert all(p._version > v for p, v, s in zip(params, versions, stepped) if s)
        p = params[1]
        loss = (p * p).sum()
        give_gradients(params, 9)
        optimizer.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@every_optimizer_and_backend
@pytest.mark.parametrize("settings", [{}, {"max_grad_norm": 1.0, "max_grad_value": 0.1}], ids=["plain", "clip"])
def test_no_gradient_is_kept(name, settings, backend, device):
    for kind in kinds(backend, device):
        params = model(kind, device=device)
        optimizer = fusedopt.registry[name](params, backend=backend, **settings)
        for number in range(5, 7):
            give_gradients(params, number)
            optimizer.step()
            grads = [weakref.ref(p.grad) for p in params if p.grad is not None]
            for p in params:
                p.grad = None
            assert not any(g() is not None for g in grads)


def test_adagrad_shares_its_memory(backend, device):
    """``share_memory()``, for training in several processes, stays in force, before the first step and after."""
    if device.type == "cuda":
        pytest.skip("torch's share_memory() does nothing to tensors of a GPU")
    for steps, kind in product((0, 2), kinds(backend, device)):
        pair = Pair("Adagrad", None, kind, backend=backend)
        pair.step(steps)
        pair.opt.share_memory()
        shared = [pair.opt.state[p]["sum"] for p in pair.ours if p.numel() and p.is_contiguous()]
        pair.step(3)
        pair.check()
        now = [pair.opt.state[p]["sum"] for p in pair.ours if p.numel() and p.is_contiguous()]
        assert all(a is b and a.is_shared() for a, b in zip(shared, now))


@pytest.mark.parametrize("name", sorted({*IN_TORCH} - {"SGD"}))
def test_processes_that_share_states_count_together(name):
    """As asynchronous actor-critic trainers do it: each process goes on from the count that all have reached."""
    pair = Pair(name, None, "tiny")
    pair.step(2)
    for optimizer in (pair.opt, pair.oracle):
        for state in optimizer.state.values():
            for value in state.values():
                value.share_memory_()
    shared = [value for state in pair.opt.state.values() for value in state.values()]
    for _ in range(2):
        pair.step()
        for optimizer in (pair.opt, pair.oracle):
            for state in optimizer.state.values():
                state["step"].numpy()[...] += 3  # as another process, of which no version tells
    pair.step()
    pair.check()
    now = [value for state in pair.opt.state.values() for value in state.values()]
    assert all(a is b and a.is_shared() for a, b in zip(shared, now, strict=True))
    pair.opt.max_grad_norm = 1.0
    with pytest.raises(RuntimeError, match="max_grad_norm cannot be combined with a step count that processes share"):
        pair.step()
