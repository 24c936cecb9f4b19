"""What fusedopt adds: the gradient norm, skipped steps, and settings that change and survive."""

import copy
import math
import pickle

import pytest
import torch
from cases import (
    clip_settings,
    every_kind_and_backend,
    every_optimizer,
    give_gradients,
    interpreter_noise,
    kinds,
    model,
)
from options import LR, STATEFUL
from oracles import oracle_class
from pairs import Pair, assert_same, close, snapshot
from thinning import every_pair, every_pair_but

import fusedopt


def norm_of(params):
    return torch.cat([p.grad.double().flatten() for p in params if p.grad is not None]).norm()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["tiny", "small", "large"])
def test_gradient_norm(kind, dtype, backend, device):
    if backend == "triton" and kind == "large" and device.type == "cpu":
        pytest.skip("too slow in the interpreter")
    params = model(kind, dtype, device)
    optimizer = fusedopt.SGD(params, max_grad_norm=3.0, backend=backend)
    assert optimizer.grad_norm is None
    seen = []
    for number in range(3):
        give_gradients(params, number)
        exact = norm_of(params)
        optimizer.step()
        norm = optimizer.grad_norm
        assert (norm.shape, norm.device.type) == ((), device.type)
        assert norm.dtype == (torch.float64 if dtype is torch.float64 else torch.float32)
        # Before clipping. float32 sums rows of 4096 squares: a few roundings of 6e-8.
        torch.testing.assert_close(norm.double(), exact, rtol=1e-6, atol=0)
        seen.append((norm, exact))
    for norm, exact in seen:  # a list of logged norms is no list of the latest
        torch.testing.assert_close(norm.double(), exact, rtol=1e-6, atol=0)
    optimizer.grad_norm.zero_()
    assert optimizer.grad_norm != 0
    optimizer.zero_grad()
    optimizer.step()
    assert optimizer.grad_norm == 0
    optimizer.max_grad_norm = None
    give_gradients(params, 3)
    optimizer.step()
    assert optimizer.grad_norm is None


@pytest.mark.parametrize("size", [1e-30, 1e30])
@pytest.mark.parametrize("count", [5, 20_000, 100_000])
def test_norm_of_extreme_float32_gradients(size, count, device):
    """Their squares are 0 or inf in float32; the norm, and the clipped gradient, are ordinary numbers."""
    p = torch.nn.Parameter(torch.zeros(count, device=device))
    optimizer = fusedopt.SGD([p], lr=1.0, max_grad_norm=1.0, skip_nonfinite=True)
    p.grad = torch.full_like(p, size)
    optimizer.step()
    assert optimizer.skipped_steps == 0
    expected = size * math.sqrt(count)
    assert float(optimizer.grad_norm) == pytest.approx(expected, rel=1e-6)
    # Division by norm + 1e-6, in float32.
    assert float(p[0].detach()) == pytest.approx(-size * min(1, 1 / (expected + 1e-6)), rel=1e-5)


def test_norm_of_extreme_float64_gradients(device):
    """Judged by element: finite gradients whose squares overflow even float64 are clipped, not skipped."""
    params = [torch.nn.Parameter(torch.zeros(n, dtype=torch.float64, device=device)) for n in (3, 2)]
    optimizer = fusedopt.SGD(params, lr=1.0, max_grad_norm=1.0, skip_nonfinite=True, backend="torch")
    for p in params:
        p.grad = torch.full_like(p, 1e160)
    optimizer.step()
    assert optimizer.skipped_steps == 0
    assert float(optimizer.grad_norm) == pytest.approx(1e160 * 5**0.5, rel=1e-12)
    assert float(params[0][0].detach()) == pytest.approx(-(5**-0.5), rel=1e-12)


@every_pair_but("bad", "flatten")
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("flatten", [False, True], ids=["in place", "flatten"])
@every_kind_and_backend
def test_nonfinite_steps_are_skipped(name, bad, flatten, backend, device):
    """All bits stay, states and counts included; the next step is that of an optimizer that never saw the bad one."""
    settings = {"backend": backend, "flatten": flatten, "skip_nonfinite": True, "max_grad_norm": 4.0}
    for kind in kinds(backend, device):
        pair = Pair(name, None, kind, device=device, start=0, **settings)
        undisturbed = Pair(name, None, kind, device=device, start=0, **settings)
        skipped = 0
        for number in range(6):
            if number in (0, 3, 4):
                before = snapshot(pair.opt)
                give_gradients(pair.ours, number, plain=True)
                pair.ours[1 if number else -1].grad.view(-1)[-1] = bad
                pair.opt.step()
                skipped += 1
                after = snapshot(pair.opt)
                # The bad gradient may be a parameter's first: its state may be there then, at its beginning.
                newcomers = [after["states"].pop(k) for k in after["states"].keys() - before["states"].keys()]
                assert all(state.get("step", 0) == 0 for state in newcomers)
                assert name != "SGD" or not any(newcomers)
                assert_same(before, after)
                assert not math.isfinite(pair.opt.grad_norm)
            assert pair.opt.skipped_steps == skipped
            pair.step()
            undisturbed.step()
            assert_same(snapshot(undisturbed.opt), snapshot(pair.opt))
        pair.check()
        count = pair.opt.skipped_steps
        count.zero_()
        assert pair.opt.skipped_steps == skipped


def test_without_the_setting_nothing_is_skipped(backend, device):
    params = model("tiny", device=device)
    optimizer = fusedopt.SGD(params, lr=0.1, backend=backend)
    give_gradients(params, 5, plain=True)
    params[1].grad[0, 0] = math.inf
    optimizer.step()
    assert params[1][0, 0] == -math.inf
    assert optimizer.skipped_steps == 0


@interpreter_noise
@pytest.mark.parametrize("dtypes", [(torch.float64, torch.float32), (torch.float32, torch.float32)], ids=str)
def test_nan_and_inf_together_are_nan(dtypes, backend, device):
    """As in torch: a NaN norm clips every gradient to NaN, which shows; an infinite norm to 0, which hides."""
    norms = []
    for bad in ([math.nan, 1.0], [math.inf, math.nan], [math.nan, math.inf], [math.inf, 1.0]):
        params = [torch.nn.Parameter(torch.ones(20_000, dtype=dtype, device=device)) for dtype in dtypes]
        optimizer = fusedopt.SGD(params, lr=1.0, max_grad_norm=1.0, backend=backend)
        for p, value in zip(params, bad):
            p.grad = torch.ones_like(p)
            p.grad[7] = value
        optimizer.step()
        norms.append(float(optimizer.grad_norm))
        assert all(p[0].isnan() if math.nan in bad else p[0] == 1 for p in params)
    assert [math.isnan(norm) for norm in norms] == [True, True, True, False]


@every_pair
@pytest.mark.parametrize("after", ["load", "load other", "deepcopy", "edit", "switch backend"])
@every_kind_and_backend
def test_skipped_step_and_then(name, after, backend, device):
    """What was skipped on the device is known before anything else touches the counts."""
    pair = Pair(name, None, "tiny", device=device, groups=False, backend=backend, skip_nonfinite=True)
    pair.step(6)
    saved = copy.deepcopy(pair.opt.state_dict())
    give_gradients(pair.ours, 6, plain=True)
    pair.ours[1].grad[0, 0] = math.nan
    pair.opt.step()
    if after == "load":
        pair.opt.load_state_dict(saved)
    elif after == "load other":
        pair.opt.load_state_dict(copy.deepcopy(pair.oracle.state_dict()))
    elif after == "deepcopy":
        pair.ours, pair.opt = copy.deepcopy((pair.ours, pair.opt))
    elif after == "edit" and name != "SGD":
        for optimizer in (pair.opt, pair.oracle):
            for state in optimizer.state.values():
                state["step"].fill_(10)
    elif after == "switch backend":
        pair.opt.backend = "torch"
    pair.step(3)
    pair.check()


@every_kind_and_backend
def test_settings_change_between_steps(name, backend, device):
    pair = Pair(name, None, "tiny", device=device, backend=backend)
    for changes in (
        {"max_grad_norm": 3.0},
        {"max_grad_value": 0.5},
        {"max_grad_norm": None},
        {"max_grad_value": (None, 0.3), "flatten": True},
        {"max_grad_value": [-0.2, 0.3]},
        {"max_grad_value": None, "skip_nonfinite": True},
        {"max_grad_norm": 5, "backend": "torch"},
        {"backend": backend, "flatten": False},
    ):
        for key, value in changes.items():
            setattr(pair.opt, key, value)
            assert getattr(pair.opt, key) in (value, tuple(value) if isinstance(value, list) else value)
        pair.step(2)
        pair.check()
        assert f"backend {pair.opt.backend}" in pair.opt.layout()
    # Clipping is no hyperparameter of a group: checkpoints stay torch's.
    assert "max_grad_norm" not in pair.opt.param_groups[0]


@pytest.mark.parametrize("carry", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_settings_survive_copies(carry):
    settings = {
        "max_grad_norm": 3.0,
        "max_grad_value": (-1.0, None),
        "skip_nonfinite": True,
        "flatten": True,
        "backend": "torch",
    }
    optimizer = fusedopt.Adam(model(), **settings)
    duplicate = carry(optimizer)
    assert {key: getattr(duplicate, key) for key in settings} == settings
    duplicate.max_grad_norm = 1.0
    assert optimizer.max_grad_norm == 3.0


def test_settings_survive_loading():
    optimizer = fusedopt.Adam(model(), max_grad_norm=3.0, max_grad_value=1.0)
    optimizer.load_state_dict(torch.optim.Adam(model()).state_dict())
    assert (optimizer.max_grad_norm, optimizer.max_grad_value) == (3.0, 1.0)


def test_wrappers_that_copy_the_dict_share_the_settings():
    """As Lightning Fabric wraps an optimizer."""
    params = model()
    optimizer = fusedopt.SGD(params, lr=1.0)

    class Wrapper(type(optimizer)):
        def __init__(self, wrapped):
            self.__dict__.update({k: v for k, v in wrapped.__dict__.items() if k not in ("state_dict", "step")})

    wrapper = Wrapper(optimizer)
    wrapper.max_grad_value = 0.25
    assert optimizer.max_grad_value == 0.25
    give_gradients(params, 5)
    before = params[1].detach().clone()
    optimizer.step()
    assert (before - params[1].detach()).abs().max() <= 0.25 + 1e-15
    assert "Wrapper" not in fusedopt.registry


@every_optimizer
def test_norm_is_over_all_groups_dtypes_and_layouts(name, device):
    """Three dtypes, two groups: one norm, one factor."""
    groups = [[*model("tiny", dtype, device)] for dtype in (torch.float64, torch.float32, torch.bfloat16)]
    exact = [torch.nn.Parameter(p.detach().double()) for group in groups for p in group]
    params = [p for group in groups for p in group]
    options = {"lr": LR, **STATEFUL[name]}
    optimizer = fusedopt.registry[name]([{"params": group} for group in groups], **options, max_grad_norm=2.0)
    oracle = oracle_class(name)(exact, **options, foreach=False)
    for number in (5, 6):
        give_gradients(params, number)
        for p, q in zip(params, exact):
            q.grad = None if p.grad is None else p.grad.contiguous().to(torch.float64, copy=True)
        optimizer.step()
        norm = torch.nn.utils.clip_grad_norm_(exact, 2.0)
        torch.testing.assert_close(optimizer.grad_norm, norm, rtol=1e-6, atol=0)
        oracle.step()
    close([p.double() for p in groups[1]], exact[5:10], 1e-5)  # float32, with states in float32
    close([p.double() for p in groups[2]], exact[10:], 0.05)  # bfloat16 rounds at 2^-9
    # float64, but the norm comes in part from float32 sums.
    close(groups[0], exact[:5], 1e-6)


def test_layout_says_what_runs_where(backend, device):
    params = model("tiny", device=device)
    optimizer = fusedopt.AdamW(params, backend=backend, **clip_settings("both", "tiny"))
    assert "first step" in optimizer.layout()
    give_gradients(params, 5)
    optimizer.step()
    assert all(
        word in optimizer.layout()
        for word in ("adam", str(device.type), "float64", "5 parameters", "1 set of", backend)
    )


@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_settings_that_come_and_go_round_once_in_16_bits(name):
    """torch's fused kernels take 16-bit parameters only where nothing is done between gradient and parameter besides
    the formula."""
    generator = torch.Generator().manual_seed(0)
    p = torch.nn.Parameter(torch.randn(300, 100, generator=generator).bfloat16())
    optimizer = fusedopt.registry[name]([p], lr=0.1)
    for settings in ({}, {"max_grad_value": 0.3}, {"max_grad_value": None, "track": "total"}, {"track": None}):
        q = torch.nn.Parameter(p.detach().float())
        wide = fusedopt.registry[name]([q], lr=0.1)
        q.grad = torch.zeros_like(q)
        wide.step()
        for key, value in optimizer.state[p].items():
            wide.state[q][key].copy_(value)
        if not optimizer.state[p]:
            wide.state[q].clear()
        q.data.copy_(p.detach())
        for key, value in settings.items():
            setattr(optimizer, key, value)
        wide.max_grad_value = optimizer.max_grad_value
        p.grad = torch.randn(p.shape, generator=generator).bfloat16()
        q.grad = p.grad.float()
        optimizer.step()
        wide.step()
        assert torch.equal(p, q.bfloat16())
        assert torch.equal(optimizer.state[p]["exp_avg"], wide.state[q]["exp_avg"].bfloat16())
