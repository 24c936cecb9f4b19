"""``optimizer.metrics``: norms of gradient, update and parameter, out of the pass that updates."""

import math

import pytest
import torch
from cases import (
    KERNEL_NAMES,
    clip_settings,
    every_optimizer_and_backend,
    give_gradients,
    interpreter_noise,
    kinds,
    model,
)
from options import LR, STATEFUL
from pairs import Pair, assert_same, same_bits, snapshot
from rule_cases import parameters, set_gradients, tensors

import fusedopt
from fusedopt import means, torch_blocks
from fusedopt.clipping import Verdict
from fusedopt.custom import jit, tl
from fusedopt.rule import Rule

AT_ONCE = {"launches": 1, "max_grad_norm": 4.0}

variants = pytest.mark.parametrize(
    ("backend", "settings"),
    [("torch", {}), ("torch", {"flatten": True}), ("triton", {}), ("triton", {"flatten": True}), ("triton", AT_ONCE)],
    ids=str,
    indirect=["backend"],
)


def step_and_expect(optimizer, params):
    """Take a step. Returns the three norms of each parameter, from copies of before and after it."""
    before = [p.detach().double().clone() for p in params]
    grads = [torch.zeros_like(p) if p.grad is None else p.grad.detach().clone() for p in params]
    optimizer.step()
    after = [p.detach().double() for p in params]
    return [
        torch.stack([x.double().norm() for x in xs])
        for xs in (grads, [a - b for a, b in zip(after, before)], after)
    ]  # fmt: skip


def assert_norms(metrics, expected, rtol, of_updates=0.0):
    """``of_updates``: how exactly the difference of the rounded parameters tells the update, as a part of them."""
    for name, found, norms in zip(metrics._fields, metrics, expected):
        scale = expected[2] * of_updates if name == "update_norm" else 0.0
        norms = norms if found.dim() else norms.norm()
        error = (found.double() - norms).abs() - (scale if found.dim() else expected[2].norm() * of_updates)
        assert (error <= rtol * norms).all(), f"{name}: {found} instead of {norms}"


@every_optimizer_and_backend
def test_norms_of_every_optimizer(name, backend, device):
    """Around everything that a step can do, with parameters that have no gradient at some steps. The tolerances are
    float64's, for the update relative to the parameter that it is the difference of."""
    for kind in kinds(backend, device):
        for settings in ({}, {**clip_settings("both", kind), "ema_decay": 0.9, "cautious": name != "ASGD"}):
            params = model(kind, device=device)
            options = {"lr": LR, **STATEFUL[name], "backend": backend, **settings}
            optimizer = fusedopt.registry[name](params, track="parameters", **options)
            assert optimizer.metrics is None
            for number in range(3):
                give_gradients(params, number)
                expected = step_and_expect(optimizer, params)
                assert all(x.shape == (len(params),) and x.dtype == torch.float64 for x in optimizer.metrics)
                assert_norms(optimizer.metrics, expected, 1e-12, 1e-14)
                assert expected[1].any()
        optimizer.track = "total"
        assert all(x.shape == () for x in optimizer.metrics)
        assert_norms(optimizer.metrics, expected, 1e-12, 1e-14)


@variants
def test_float32(backend, settings, device):
    """Logged norms are numbers of their own. float32 adds up tiles and rows: a few roundings of 6e-8."""
    params = model("tiny" if backend == "triton" else "small", torch.float32, device)
    made = fusedopt.AdamW(params, lr=0.1, weight_decay=0.1, track="parameters", backend=backend, **settings)
    seen = []
    for number in range(3):
        give_gradients(params, number)
        expected = step_and_expect(made, params)
        metrics = made.metrics
        assert all(x.dtype == torch.float32 and x.device.type == device.type for x in metrics)
        seen.append((metrics, expected))
    for metrics, expected in seen:
        assert_norms(metrics, expected, 1e-6, 1e-7)
    made.metrics.grad_norm.zero_()
    assert made.metrics.grad_norm.any()


@pytest.mark.parametrize("tiles", [1, 16])
@variants
def test_large_tensors(backend, settings, tiles, device, monkeypatch):
    """Several tiles, programs and blocks per tensor, remainders, misaligned gradients, an empty tensor."""
    monkeypatch.setattr(means, "CHUNK", tiles)
    monkeypatch.setattr(torch_blocks, "for_threads", lambda usual: 1024 * tiles)
    sizes = [5 * 1024, 3, 9 * 1024 + 37, 0, 1024, 700, 700]
    params = parameters(sizes, device)
    made = fusedopt.RMSprop(params, lr=0.1, track="parameters", backend=backend, **settings)
    for t in range(2):
        grads = tensors(sizes, device, seed=t)
        grads[2] = torch.cat([grads[2], grads[2][:1]])[1:]  # 4 bytes off
        set_gradients(params, grads)
        expected = step_and_expect(made, params)
        assert_norms(made.metrics, expected, 1e-6, 1e-7)


def test_a_skipped_step_changes_nothing_where_parameters_are_infinite(backend, device):
    p = torch.nn.Parameter(torch.tensor([1.0, float("inf")], device=device))
    made = fusedopt.Adam([p], track="total", skip_nonfinite=True, backend=backend)
    p.grad = torch.full_like(p, float("nan"))
    made.step()
    assert made.metrics.update_norm == 0
    assert made.metrics.param_norm == float("inf")


@interpreter_noise
@pytest.mark.parametrize("bad_steps", [(0, 2), (1,)], ids=str)
@variants
def test_skipped_steps(backend, settings, bad_steps, device):
    """Nothing moves, and the norms say so; also at the first step, and for momentum that is not there yet."""
    params = model("tiny", torch.float32, device)
    made = fusedopt.SGD(
        params, lr=0.1, momentum=0.9, track="parameters", skip_nonfinite=True, backend=backend, **settings
    )
    for number in range(4):
        give_gradients(params, 5 + number)
        if number in bad_steps:
            params[1].grad[0, 0] = math.inf
        expected = step_and_expect(made, params)
        metrics = made.metrics
        if number in bad_steps:
            assert not expected[1].any() and not metrics.update_norm.any()
            assert metrics.grad_norm.isfinite().tolist() == [k != 1 for k in range(len(params))]
            torch.testing.assert_close(metrics.param_norm.double(), expected[2], rtol=1e-6, atol=0)
        else:
            assert_norms(metrics, expected, 1e-6, 1e-7)
    assert made.skipped_steps == len(bad_steps)


def test_verdicts_of_the_host():
    """With buckets on several devices the host decides; kernels that shall take norms are told of a skip, too."""
    assert Verdict().on(torch.device("cpu")) is None
    assert Verdict(skip=True).on(torch.device("cpu")).tolist() == [0, 1, 1, 0]


def test_several_buckets(device, needs_triton):
    """Each has its own sums, and one of them makes all skip."""
    params = [*parameters([33], device), *parameters([20], device, torch.float64)]
    made = fusedopt.SGD(params, lr=0.1, track="parameters", skip_nonfinite=True, backend="triton")
    executors = []
    for number in range(2):
        set_gradients(params, [torch.ones_like(p) for p in params])
        if number:
            params[0].grad[3] = math.nan
        expected = step_and_expect(made, params)
        executors.append(made._engine.executors)
    assert len(executors[-1]) == 2 and not made.metrics.update_norm.any()
    torch.testing.assert_close(made.metrics.param_norm, expected[2], rtol=1e-6, atol=0)
    assert made.metrics.grad_norm[0].isnan() and made.metrics.grad_norm[1] == 20**0.5


@jit
def drift(g, state, h):
    """g + 1"""
    return g + tl.full((), 1.0, g.dtype), state


class Drift(fusedopt.SGD):
    """Where a thread has no element, a rule may make something of its zeros."""

    def rule(self, group):
        return Rule("drift", (), lambda g, state, h: g + 1, kernel=drift)


@pytest.mark.parametrize("settings", [{}, AT_ONCE], ids=str)
def test_lanes_without_elements_count_nothing(settings, device, needs_triton):
    params = parameters([24, 33, 1500], device)
    made = Drift(params, lr=0.1, track="parameters", backend="triton", **settings)
    set_gradients(params, tensors([24, 33, 1500], device))
    expected = step_and_expect(made, params)
    assert_norms(made.metrics, expected, 1e-6, 1e-7)


@variants
def test_loss_scale(backend, settings, device):
    """What a GradScaler multiplied is taken out, also if it changes its scale before anybody asks."""
    params = model("tiny", torch.float32, device)
    made = fusedopt.Adam(params, lr=0.1, track="total", backend=backend, **settings)
    scale = made.grad_scale = torch.full((1,), 2.0**10, device=device)
    grads = tensors([p.shape for p in params], device)
    set_gradients(params, [2.0**10 * g for g in grads])
    made.step()
    scale.fill_(1.0)
    wanted = torch.stack([g.double().norm() for g in grads]).norm()
    torch.testing.assert_close(made.metrics.grad_norm.double(), wanted, rtol=1e-6, atol=0)


@variants
@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_tracking_changes_no_bit(name, backend, settings, device):
    ends = []
    for track in (None, "total", "parameters"):
        params = model("tiny" if backend == "triton" else "large", torch.float32, device)
        made = fusedopt.registry[name](params, lr=0.1, weight_decay=0.1, track=track, backend=backend, **settings)
        for number in range(3):
            give_gradients(params, number)
            made.step()
        ends.append(snapshot(made))
    assert_same(ends[0], ends[1])
    assert_same(ends[0], ends[2])


@pytest.mark.parametrize("settings", [{}, {"master": "split"}, {"master": "kahan", "state_dtype": "8bit"}], ids=str)
def test_updates_before_rounding(settings, backend, device):
    """bfloat16 would keep little of such small updates: the norm is that of what the formula asked for, and so that of
    float32 parameters of the same values."""
    sizes = [1500, 33]
    found = []
    for dtype, more in ((torch.bfloat16, settings), (torch.float32, {})):
        params = [torch.nn.Parameter(p.detach().to(dtype)) for p in parameters(sizes, device, torch.bfloat16)]
        made = fusedopt.SGD(params, lr=1e-4, momentum=0.9, track="parameters", backend=backend, **more)
        set_gradients(params, [g.to(dtype) for g in tensors(sizes, device, torch.bfloat16, seed=1)])
        made.step()
        found.append(made.metrics)
    for narrow, wide in zip(*found):
        assert narrow.dtype == torch.float32
        # 1e-4 of a number near 1 is known to 6e-4 as a difference in float32; over many elements it averages out.
        torch.testing.assert_close(narrow, wide, rtol=1e-4, atol=0)


def test_switched_on_and_off_in_mid_training(backend, device):
    pair = Pair("AdamW", kind="tiny", device=device, backend=backend)
    for track in (None, "total", None, "parameters"):
        pair.opt.track = track
        pair.step()
        pair.check()
        assert track is None or pair.opt.metrics.update_norm.any()


def test_no_gradient_at_all(backend, device):
    params = model("tiny", torch.float32, device)
    made = fusedopt.SGD(params, lr=0.1, track="parameters", backend=backend)
    give_gradients(params, 5)
    made.step()
    made.zero_grad()
    expected = step_and_expect(made, params)
    assert not made.metrics.grad_norm.any() and not made.metrics.update_norm.any()
    assert_norms(made.metrics, expected, 1e-6)


def test_after_a_deferred_clip(backend, device):
    """clip_grad_norm_() makes the plan of the next step; until then the norms are the latest step's."""
    params = model("tiny", torch.float32, device)
    made = fusedopt.SGD(params, lr=0.1, track="total", backend=backend)
    set_gradients(params, tensors([p.shape for p in params], device))
    made.step()
    before = made.metrics
    set_gradients(params[1:], [10 * g for g in tensors([p.shape for p in params[1:]], device)])
    params[0].grad = None
    norm = made.clip_grad_norm_(1.0)
    assert all(map(same_bits, made.metrics, before))
    made.step()
    torch.testing.assert_close(made.metrics.grad_norm, norm, rtol=1e-6, atol=0)
    torch.testing.assert_close(made.metrics.update_norm.item(), 0.1, rtol=1e-5, atol=0)


def test_off(device):
    made = fusedopt.Adam(model("tiny", device=device))
    with pytest.raises(AttributeError, match="make the optimizer with track='total'"):
        made.metrics  # noqa: B018
    assert not hasattr(made, "metrics")  # for what lists an object's attributes
    give_gradients(made.param_groups[0]["params"], 5)
    made.step()
    assert made._engine.tracker is None


def test_bad_input(device):
    for value in ("all", True, 1):
        with pytest.raises(ValueError, match=r"Invalid track: .*; choose 'total', 'parameters' or None"):
            fusedopt.Adam(model("tiny"), track=value)
    p = torch.nn.Parameter(torch.zeros(3, device=device))
    made = fusedopt.SGD([p], track="total")
    p.grad = torch.zeros(3, device=device).to_sparse()
    with pytest.raises(RuntimeError, match="track cannot be combined with a sparse gradient"):
        made.step()
    layer = torch.nn.Linear(2, 2)
    with pytest.raises(RuntimeError, match=r"gradient release updates each parameter .* which track would need"):
        fusedopt.enable_gradient_release(layer, fusedopt.SGD(layer.parameters(), track="total"))


def test_one_kernel_of_its_own(device, needs_triton):
    """Without tracking nothing of it is even made."""
    params = parameters([5], device)
    made = fusedopt.registry[KERNEL_NAMES[0]](params, lr=0.1, backend="triton")
    set_gradients(params, tensors([5], device))
    made.step()
    assert vars(made._engine.executors[0].tally).keys() == {"positions", "tables", "device", "latest"}
