"""The clipped step in one launch: the same bits as norm and update one after the other, and refused where it cannot be.

In the interpreter with one program, which passes the barrier alone; on a GPU with as many as fit.
"""

import math
from types import SimpleNamespace

import pytest
import torch
from cases import kernels_overflow
from rule_cases import (
    ADDRESSES,
    AT_ONCE,
    CASES,
    CHAINS,
    VARIANTS,
    optimizer,
    parameters,
    results,
    same_bits,
    set_gradients,
    tensors,
)

import fusedopt
from fusedopt import occupancy

pytestmark = [pytest.mark.usefixtures("needs_triton"), kernels_overflow]

# Empty, less than a vector, several tiles of the update in one of the norm, several tiles of the norm.
SIZES = [5, 0, 2100, (3, 7)]

SETTINGS = {
    "clip": {"max_grad_norm": 0.5},
    "normalize": {"max_grad_norm": 0.5, "grad_norm_mode": "normalize"},
    "skip": {"skip_nonfinite": True},
    "all": CHAINS["all"] | {"skip_nonfinite": True, "ema_decay": 0.9},
}


def assert_same_steps(one, two, device, sizes=SIZES, dtype=torch.float32, bad=()):
    """Both optimizers take the same steps, to the last bit."""
    for t in range(2):
        grads = tensors(sizes, device, dtype, seed=t)
        if t in bad:
            grads[0][1] = math.nan
        for made in (one, two):
            set_gradients(made.param_groups[0]["params"], [g.clone() for g in grads])
            made.step()
        assert same_bits(one.grad_norm, two.grad_norm)
        for got, wanted in zip(results(one), results(two)):
            assert all(map(same_bits, got, wanted))
    assert one.skipped_steps == two.skipped_steps == len(bad)
    assert one._engine.executors[0].cooperative.programs and not two._engine.executors[0].cooperative.programs


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("address", ADDRESSES)
@pytest.mark.parametrize("case", AT_ONCE[:1])
def test_same_bits_as_two_launches(case, address, settings, device):
    one, two = (
        optimizer(case, parameters(SIZES, device), address, launches=launches, **SETTINGS[settings])
        for launches in (1, 2)
    )
    assert_same_steps(one, two, device, bad=() if settings in ("clip", "normalize") else (1,))


@pytest.mark.parametrize("case", [case for case in CASES if case.split()[0] not in VARIANTS | {AT_ONCE[0]}])
def test_every_rule(case, device):
    one, two = (optimizer(case, parameters(SIZES, device), launches=k, max_grad_norm=0.5) for k in (1, 2))
    assert_same_steps(one, two, device)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_every_dtype(dtype, device):
    one, two = (optimizer("adam", parameters(SIZES, device, dtype), launches=k, max_grad_norm=0.5) for k in (1, 2))
    assert_same_steps(one, two, device, dtype=dtype)


def test_a_scaler(device):
    made = [optimizer("adam", parameters(SIZES, device), launches=k, max_grad_norm=0.5) for k in (1, 2)]
    scalers = [fusedopt.GradScaler(device.type, init_scale=3.0, growth_interval=1) for _ in made]
    for t in range(3):
        for optimizer_, scaler in zip(made, scalers):
            scaler.scale(torch.zeros((), device=device))
            grads = tensors(SIZES, device, seed=t)
            if t == 1:
                grads[2][7] = math.inf
            set_gradients(optimizer_.param_groups[0]["params"], grads)
            scaler.step(optimizer_)
            scaler.update()
        assert scalers[0].state_dict() == scalers[1].state_dict()
        for got, wanted in zip(*map(results, made)):
            assert all(map(same_bits, got, wanted))


def test_without_a_verdict_the_update_alone_is_one_launch(device):
    made = optimizer("adam", parameters(SIZES, device), launches=1)
    set_gradients(made.param_groups[0]["params"], tensors(SIZES, device))
    made.step()
    assert not made._engine.executors[0].cooperative.programs


REFUSED = {
    "several dtypes": ({}, "parameters of 2 devices, dtypes, rules or forms of states"),
    "means": ({"cautious": True}, "cautious=True"),
    "torch": ({"backend": "torch"}, "the backend is torch"),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_where_it_cannot_be(reason, device):
    settings, message = REFUSED[reason]
    params = parameters([5, 9], device)
    if reason == "several dtypes":
        params[1] = torch.nn.Parameter(params[1].detach().double())
    made = optimizer("adam", params, launches=1, max_grad_norm=1.0, **settings)
    set_gradients(params, [torch.ones_like(p) for p in params])
    before = results(made)
    with pytest.raises(RuntimeError, match=rf"launches=1 is not possible here: {message}.*launches='auto' or 2"):
        made.step()
    for got, wanted in zip(results(made), before):
        assert all(map(same_bits, got, wanted))
    made.launches = "auto"
    made.step()


def test_a_refused_first_step_leaves_no_momentum(device):
    """Whose presence would mean that there was one."""
    params = parameters([5], device)
    made = optimizer("momentum", params, launches=1, max_grad_norm=1.0, cautious=True)
    set_gradients(params, tensors([5], device))
    made.state.clear()
    with pytest.raises(RuntimeError, match="launches=1 is not possible here"):
        made.step()
    assert not any(map(len, made.state_dict()["state"].values()))
    made.launches = 2
    made.step()
    assert set(made.state[params[0]]) == {"momentum_buffer"}


def test_not_with_clip_grad_norm(device):
    params = parameters([5], device)
    made = optimizer("adam", params, launches=1)
    set_gradients(params, tensors([5], device))
    made.clip_grad_norm_(1.0)
    with pytest.raises(RuntimeError, match=r"launches=1 is not possible here: clip_grad_norm_\(\)"):
        made.step()


@pytest.mark.parametrize("launches", [0, 3, True, "1", None])
def test_bad_values(launches):
    with pytest.raises(ValueError, match="Invalid launches"):
        fusedopt.SGD(parameters([5], "cpu"), launches=launches)


HOPPER = occupancy.Multiprocessors(132, 2048, 65536, 233472)
TURING = occupancy.Multiprocessors(40, 1024, 65536, 65536)


def compiled(registers, warps, shared=0, backend="cuda"):
    target = SimpleNamespace(backend=backend)
    return SimpleNamespace(n_regs=registers, metadata=SimpleNamespace(num_warps=warps, shared=shared, target=target))


@pytest.mark.parametrize(
    ("registers", "warps", "shared", "on", "programs"),
    [
        # As NVIDIA's occupancy calculator says.
        (64, 8, 0, HOPPER, 4),
        (65, 8, 0, HOPPER, 3),
        (72, 8, 0, HOPPER, 3),
        (80, 8, 0, HOPPER, 3),
        (96, 8, 0, HOPPER, 2),
        (128, 8, 0, HOPPER, 2),
        (255, 8, 0, HOPPER, 1),
        (255, 16, 0, HOPPER, 0),
        (32, 8, 0, HOPPER, 8),
        (32, 8, 0, TURING, 4),
        (32, 8, 100_000, HOPPER, 2),
        (16, 1, 0, HOPPER, 16),  # 32 there, but not on every GPU
    ],
)
def test_programs_that_fit(registers, warps, shared, on, programs):
    assert occupancy.resident_programs(compiled(registers, warps, shared), on) == programs


@pytest.mark.parametrize("slots", [1, 4, 1024])
@pytest.mark.parametrize("per", [1, 3, 4])
@pytest.mark.parametrize("count", [1, 40, 132, 2000])
def test_grid(slots, per, count):
    """Never more programs than fit or than there are slots, and none of them has a slot less than it must."""
    programs = occupancy.grid(slots, per, count)
    assert 1 <= programs <= min(slots, per * count)
    most = -(-slots // min(slots, per * count))
    assert -(-slots // programs) == most
