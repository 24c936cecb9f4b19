"""The textbook formulas of textbook.py against fusedopt: both on their own way through the same problem."""

import math
from collections import defaultdict
from copy import deepcopy

import numpy as np
import pytest
import torch
from cases import interpreter_noise
from textbook import CLIPPING, ROWS, STEPS
from thinning import ALL, every_pair

import fusedopt

pytestmark = interpreter_noise

# float64 rounds at 1.1e-16, float32 at 6e-8; a dozen operations per step, 50 steps whose errors are of either sign,
# and gradients that are the same in both.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6}

RUNS = pytest.mark.parametrize(
    ("backend", "dtype"),
    [("torch", torch.float64), ("torch", torch.float32), ("triton", torch.float32)],
    ids=["torch-float64", "torch-float32", "kernel-float32"],
    indirect=["backend"],
)
rows = pytest.mark.parametrize("row", ROWS)


def compare(row, dtype, backend, device, objective, clip="none", eta=lambda t: 0.05, size=8):
    """The literal formula in NumPy, in float64, beside fusedopt: both on their own way through the same problem. In the
    interpreter, whose numbers of a step are the fallback's, a part of the way."""
    name, options, update, _ = ROWS[row]
    settings, clipped = CLIPPING[clip]
    generator = np.random.default_rng(0)
    # Numbers that float32 holds too, and one component whose gradient always is zero.
    theta, curvature, noise = (
        x.astype(np.float32).astype(np.float64)
        for x in (generator.normal(size=size), generator.uniform(0.1, 2, size), generator.normal(size=(STEPS, size)))
    )
    curvature[0] = noise[:, 0] = 0
    p = torch.nn.Parameter(torch.from_numpy(theta.copy()).to(device, dtype))
    optimizer = fusedopt.registry[name]([p], lr=eta(1), backend=backend, **options, **settings)
    memory, moved = defaultdict(float), False
    is_interpreted = backend == "triton" and device.type == "cpu" and not ALL
    for t in range(1, (15 if is_interpreted else STEPS) + 1):
        gradient = (lambda x: curvature * x) if objective == "quadratic" else (lambda x, t=t: noise[t - 1])
        at = p.detach().cpu().double().numpy()
        p.grad = torch.from_numpy(gradient(at).copy()).to(device, dtype)  # a copy: clipping may write to it
        optimizer.param_groups[0]["lr"] = eta(t)
        optimizer.step()
        before = theta
        theta = update(theta, lambda x, gradient=gradient: clipped(gradient(x)), eta(t), t, memory)
        moved |= bool(np.abs(theta - before).max() > 1e-3)
        np.testing.assert_allclose(p.detach().cpu(), theta, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    assert moved != (row == "F4 with beta 1")


@every_pair
@RUNS
@rows
@pytest.mark.parametrize("objective", ["quadratic", "random"])
def test_update_rule(row, objective, backend, dtype, device):
    compare(row, dtype, backend, device, objective)


@RUNS
@pytest.mark.parametrize("row", [row for row in ROWS if not ROWS[row].constant_eta])
def test_update_rule_under_a_schedule(row, backend, dtype, device):
    """F2 and F3 differ as soon as the learning rate changes."""
    if backend == "triton" and ROWS[row].optimizer != "SGD":
        return  # the others' kernels do not know the learning rate
    compare(row, dtype, backend, device, "random", eta=lambda t: 0.05 * 0.97**t)


@every_pair
@RUNS
@pytest.mark.parametrize("clip", CLIPPING)
@pytest.mark.parametrize("row", ["F1 gradient descent", "F3 momentum, velocity", "F12 Adam"])
def test_clipping(row, clip, backend, dtype, device):
    compare(row, dtype, backend, device, "random", clip)


@pytest.mark.parametrize("size", [0.0, 1e-42, 1e-20, 1e20])
@pytest.mark.parametrize("loss_scale", [None, 1024.0])
def test_normalized_gradients_of_any_size(size, loss_scale, backend, device):
    """Zero stays zero, and the smallest ones do not overflow on their way up."""
    p = torch.nn.Parameter(torch.zeros(9, device=device))
    optimizer = fusedopt.SGD([p], lr=1.0, max_grad_norm=3.0, grad_norm_mode="normalize", backend=backend)
    p.grad = torch.full_like(p, size)
    if loss_scale is not None:
        optimizer.grad_scale = torch.tensor(loss_scale, device=device)
    optimizer.step()
    # 2^126 is the most that a gradient is enlarged by.
    expected = -1.0 if size > 1e-30 else -size * 2.0**126 / (loss_scale or 1)
    # 1e-42 is a multiple of float32's smallest number, 1.4e-45, and then one of 6e-8.
    torch.testing.assert_close(p.detach(), torch.full_like(p, expected), rtol=1e-6 if size > 1e-30 else 1e-3, atol=0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_normalized_gradients_show_nan(bad, backend, device):
    p = torch.nn.Parameter(torch.zeros(3, device=device))
    optimizer = fusedopt.SGD([p], lr=1.0, max_grad_norm=3.0, grad_norm_mode="normalize", backend=backend)
    p.grad = torch.tensor([bad, 1.0, 0.0], device=device)
    optimizer.step()
    assert p[0].isnan()


@pytest.mark.parametrize("name", ["Adagrad", "RMSprop", "Adam", "AdamW"])
@pytest.mark.parametrize("settings", [{}, {"eps_inside_sqrt": True}], ids=["", "inside"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_eps_may_be_zero(name, settings, dtype, backend, device):
    """As torch, but where that has 0 / 0; the two places of eps are one."""
    ours, theirs = (torch.nn.Parameter(torch.ones(3, dtype=dtype, device=device)) for _ in range(2))
    optimizer = fusedopt.registry[name]([ours], lr=0.1, eps=0, weight_decay=0, backend=backend, **settings)
    oracle = getattr(torch.optim, name)([theirs], lr=0.1, eps=0, weight_decay=0)
    for t in range(3):
        for p in (ours, theirs):
            p.grad = torch.tensor([0.0, 1e-10, -2.0 + t], device=device).to(dtype)
        optimizer.step()
        oracle.step()
    assert ours[0] == 1 and theirs[0].isnan()
    # One rounding of 16 bits, a dozen of float32.
    bound = 2**-7 if dtype is torch.bfloat16 else 1e-6
    torch.testing.assert_close(ours[1:], theirs[1:], rtol=bound, atol=0)


@pytest.mark.skipif(not torch.set_flush_denormal(False), reason="this processor keeps subnormal numbers")
@pytest.mark.parametrize("cautious", [False, True])
def test_eps_of_zero_where_subnormal_numbers_are_flushed(cautious):
    """What takes its place must not become one in a bias correction."""
    torch.set_flush_denormal(True)
    try:
        for name in ("Adam", "NAdam", "RAdam", "RMSprop", "Adan", "AdEMAMix", "StableAdamW", "LAMB"):
            p = torch.nn.Parameter(torch.ones(3))
            optimizer = fusedopt.registry[name]([p], lr=0.1, eps=0.0, weight_decay=0.0, cautious=cautious)
            for _ in range(3):
                p.grad = torch.tensor([0.0, 1.0, -2.0])
                optimizer.step()
            assert p[0] == 1 and p.isfinite().all(), name
    finally:
        torch.set_flush_denormal(False)


CONTRADICTIONS = [
    ({"momentum_form": "average"}, {"momentum": 0.9, "dampening": 0.1}, "dampening=0.1"),
    ({"momentum_form": "velocity"}, {"momentum": 0.9, "dampening": 0.1}, "dampening=0.1"),
    ({"momentum_form": "average"}, {"momentum": 1.5}, "momentum=1.5"),
]


@pytest.mark.parametrize(("settings", "options", "message"), CONTRADICTIONS)
def test_contradictions_are_refused(settings, options, message):
    """In the constructor, in a new group, when the setting changes, and in a step: nothing changes."""
    ours, other = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    ours.grad = torch.ones(2)
    with pytest.raises(ValueError, match=message):
        fusedopt.SGD([ours], lr=0.1, **settings, **options)
    optimizer = fusedopt.SGD([ours], lr=0.1, momentum=0.9, **settings)
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [other], **options})
    assert len(optimizer.param_groups) == 1
    optimizer.param_groups[0].update(options)
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    assert torch.equal(ours.detach(), torch.ones(2)) and not optimizer.state
    optimizer = fusedopt.SGD([ours], lr=0.1, **options)
    with pytest.raises(ValueError, match=message):
        optimizer.momentum_form = settings["momentum_form"]
    assert optimizer.momentum_form == "accumulated"


def test_normalizing_needs_a_norm():
    with pytest.raises(ValueError, match="needs max_grad_norm"):
        fusedopt.SGD([torch.nn.Parameter(torch.ones(2))], grad_norm_mode="normalize")
    optimizer = fusedopt.SGD([torch.nn.Parameter(torch.ones(2))], max_grad_norm=1.0, grad_norm_mode="normalize")
    with pytest.raises(ValueError, match="needs max_grad_norm"):
        optimizer.max_grad_norm = None
    assert optimizer.max_grad_norm == 1.0


@pytest.mark.parametrize("form", ["velocity", "average"])
def test_other_forms_have_other_states(form, backend, device):
    """A checkpoint continues to the last bit, and torch's buffer never means another thing."""
    params = [torch.nn.Parameter(torch.ones(5, device=device)) for _ in range(2)]
    first, second = (
        fusedopt.SGD([p], lr=0.1, momentum=0.9, momentum_form=form, backend=backend, skip_nonfinite=True)
        for p in params
    )
    params[0].grad = torch.full((5,), math.inf, device=device)
    first.step()
    assert first.state_dict()["state"] == {0: {}}  # a skipped first step leaves none
    for t in range(4):
        params[0].grad = torch.arange(5.0, device=device) - t
        first.step()
    (state,) = first.state_dict()["state"].values()
    assert list(state) == [{"velocity": "velocity", "average": "grad_avg"}[form]]
    assert first.param_groups[0].keys() == torch.optim.SGD(params, momentum=0.9).param_groups[0].keys()
    second.load_state_dict(deepcopy(first.state_dict()))
    params[1].data.copy_(params[0].data)
    for optimizer, p in zip((first, second), params):
        p.grad = torch.ones(5, device=device)
        optimizer.step()
    assert torch.equal(*params)
    # Another form has nothing of that memory, and starts anew.
    first.momentum_form = "accumulated"
    before = params[0].detach().clone()
    first.step()
    torch.testing.assert_close(params[0].detach(), before - 0.1)
