"""optimizer.clip_grad_norm_: torch.nn.utils.clip_grad_norm_, but the step does the work."""

import math

import pytest
import torch
from cases import every_optimizer_and_backend, give_gradients, model
from pairs import Pair, assert_same, same_bits, snapshot
from test_amp import BAD, give_scaled_gradients, scalers
from thinning import every_pair

import fusedopt


def clip_by_torch(pair, max_norm, **arguments):
    return torch.nn.utils.clip_grad_norm_(pair.theirs, max_norm, foreach=False, **arguments)


def give_both(pair, number):
    for params in (pair.ours, pair.theirs):
        give_gradients(params, number, plain=True)


def stepped(device, **settings):
    """Parameters, and an optimizer that has all its states."""
    params = model("tiny", device=device)
    optimizer = fusedopt.Adam(params, **settings)
    give_gradients(params, 5)
    optimizer.step()
    give_gradients(params, 6, plain=True)
    return params, optimizer


def grads_of(params):
    return [p.grad.clone() for p in params if p.grad is not None]


@every_pair
@every_optimizer_and_backend
@pytest.mark.parametrize("flatten", [False, True], ids=["in place", "flatten"])
def test_as_torch(name, flatten, backend, device):
    """At some steps it binds, at others not, and at some it is not called."""
    pair = Pair(name, None, "tiny", device=device, backend=backend, flatten=flatten, max_grad_value=0.9)
    for number, max_norm in enumerate((2.0, None, 1e6, 0.5, 0.0, None, 3.0)):
        give_both(pair, number)
        before = grads_of(pair.ours)
        if max_norm is not None:
            norm, expected = pair.opt.clip_grad_norm_(max_norm), clip_by_torch(pair, max_norm)
            torch.testing.assert_close(norm, expected, rtol=1e-12, atol=0)
            assert all(map(same_bits, before, grads_of(pair.ours)))
        for p in pair.theirs:
            if p.grad is not None:
                p.grad.clamp_(-0.9, 0.9)
        pair.opt.step()
        pair.oracle.step()
        if max_norm is not None:
            assert pair.opt.grad_norm == norm
    pair.check()


@pytest.mark.parametrize("norm_type", [1, 3.0])
def test_other_norms_are_torchs(norm_type, backend, device):
    pair = Pair("Adam", None, "tiny", device=device, backend=backend)
    give_both(pair, 5)
    norm = pair.opt.clip_grad_norm_(0.7, norm_type)
    expected = clip_by_torch(pair, 0.7, norm_type=norm_type)
    torch.testing.assert_close(norm, expected, rtol=1e-12, atol=0)
    pair.opt.step()
    pair.oracle.step()
    pair.check()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_error_if_nonfinite(bad, backend, device):
    params, optimizer = stepped(device, backend=backend)
    params[1].grad[0, 0] = bad
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match=r"norm of order 2\.0 .* is non-finite"):
        optimizer.clip_grad_norm_(1.0, error_if_nonfinite=True)
    assert not math.isfinite(optimizer.clip_grad_norm_(1.0))
    assert_same(before, snapshot(optimizer))


def test_without_gradients(device):
    optimizer = fusedopt.Adam(model("tiny", device=device))
    assert optimizer.clip_grad_norm_(1.0) == 0
    optimizer.step()


FORGETTING = {
    "zero_grad": lambda optimizer, params: optimizer.zero_grad(),
    "zeros": lambda optimizer, params: optimizer.zero_grad(set_to_none=False),
    "of the model": lambda optimizer, params: [setattr(p, "grad", None) for p in params],
}


@pytest.mark.parametrize("way", FORGETTING)
def test_gradients_that_are_dropped_take_their_clipping_along(way, backend, device):
    pair = Pair("Adam", None, "tiny", device=device, backend=backend, skip_nonfinite=True)
    for number in (5, 6):
        give_both(pair, number)
        pair.ours[1].grad[0, 0] = math.nan
        pair.opt.clip_grad_norm_(1e-3)
        FORGETTING[way](pair.opt, pair.ours)
        give_both(pair, number)
        if number == 6:
            pair.opt.clip_grad_norm_(0.5)
            clip_by_torch(pair, 0.5)
        pair.opt.step()
        pair.oracle.step()
    assert pair.opt.skipped_steps == 0
    pair.check()


def write_to_one(params):
    params[1].grad.mul_(2)


def replace_one(params):
    params[1].grad = params[1].grad.clone()


def drop_one(params):
    params[1].grad = None


@pytest.mark.parametrize("change", [write_to_one, replace_one, drop_one])
def test_gradients_may_not_change_before_the_step(change, backend, device):
    params, optimizer = stepped(device, backend=backend)
    optimizer.clip_grad_norm_(1.0)
    change(params)
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match="gradients were changed between clip_grad_norm_"):
        optimizer.step()
    assert_same(before, snapshot(optimizer))
    optimizer.zero_grad()
    give_gradients(params, 5)
    optimizer.step()


def test_bad_calls(backend, device):
    params, optimizer = stepped(device, max_grad_norm=1.0, backend=backend)
    before = snapshot(optimizer)
    for max_norm in (-1.0, math.nan):
        with pytest.raises(ValueError, match="Invalid max_norm"):
            optimizer.clip_grad_norm_(max_norm)
    given = grads_of(params)
    for norm_type in (2.0, 1.0, math.inf):
        with pytest.raises(RuntimeError, match=r"max_grad_norm=1\.0 by itself"):
            optimizer.clip_grad_norm_(1.0, norm_type)
    assert all(map(same_bits, given, grads_of(params)))
    optimizer.max_grad_norm = None
    optimizer.clip_grad_norm_(1.0)
    with pytest.raises(RuntimeError, match="twice"):
        optimizer.clip_grad_norm_(1.0)
    optimizer.max_grad_norm = 2.0
    with pytest.raises(RuntimeError, match=r"max_grad_norm=2\.0 was set between"):
        optimizer.step()
    assert_same(before, snapshot(optimizer))


@every_optimizer_and_backend
def test_nonfinite_steps_are_skipped_once(name, backend, device):
    pair = Pair(name, None, "tiny", device=device, backend=backend, skip_nonfinite=True)
    for number in (5, 6, 7):
        give_both(pair, number)
        if number == 6:
            pair.ours[1].grad[0, 0] = math.inf
        pair.opt.clip_grad_norm_(0.5)
        assert pair.opt.skipped_steps == (number == 7)
        pair.opt.state_dict()  # settles what the device knows
        pair.opt.step()
        if number != 6:
            clip_by_torch(pair, 0.5)
            pair.oracle.step()
    assert pair.opt.skipped_steps == 1
    pair.check()


@every_pair
@every_optimizer_and_backend
@pytest.mark.parametrize("way", ["of the scaler", "unscaled before", "norm 1"])
def test_with_a_scaler(name, way, backend, device):
    pair = Pair(name, None, "tiny", device=device, backend=backend)
    ours, theirs = scalers(device)
    norm_type = 1.0 if way == "norm 1" else 2.0
    for number in range(6):
        give_scaled_gradients(pair.ours, ours, number)
        give_scaled_gradients(pair.theirs, theirs, number)
        if way == "unscaled before":
            ours.unscale_(pair.opt)
            norm = pair.opt.clip_grad_norm_(0.5)
        else:
            norm = ours.clip_grad_norm_(pair.opt, 0.5, norm_type)
        theirs.unscale_(pair.oracle)
        expected = clip_by_torch(pair, 0.5, norm_type=norm_type)
        torch.testing.assert_close(norm, expected, rtol=1e-12, atol=0, equal_nan=True)
        ours.step(pair.opt)
        theirs.step(pair.oracle)
        ours.update()
        theirs.update()
        assert ours.state_dict() == theirs.state_dict()
    assert pair.opt.skipped_steps == len(BAD.keys() & set(range(6)))
    pair.check()


def test_misuse_with_a_scaler(backend, device):
    params, optimizer = stepped(device, backend=backend)
    scaler, _ = scalers(device)
    before = snapshot(optimizer)

    give_scaled_gradients(params, scaler, 5)
    optimizer.clip_grad_norm_(1.0)
    with pytest.raises(RuntimeError, match="still multiplied by the loss scale: call fusedopt"):
        scaler.step(optimizer)
    optimizer.zero_grad()

    give_scaled_gradients(params, scaler, 5)
    scaler.clip_grad_norm_(optimizer, 1.0)
    with pytest.raises(RuntimeError, match=r"unscale_\(\) is being called after clip_grad_norm_"):
        scaler.unscale_(optimizer)
    with pytest.raises(RuntimeError, match=r"call scaler\.step"):
        optimizer.step()
    assert_same(before, snapshot(optimizer))

    for p in params:
        p.grad = None
    give_scaled_gradients(params, scaler, 5)
    scaler.unscale_(optimizer)
    scaler.step(optimizer)


def test_a_checkpoint_between_clipping_and_the_first_step(backend, device):
    """A momentum buffer that was never written stays out of it: torch takes it for a first step that was."""
    (p,) = params = [torch.nn.Parameter(torch.zeros(3, device=device))]
    optimizer = fusedopt.SGD(params, lr=1.0, momentum=0.9, dampening=0.5, backend=backend)
    p.grad = torch.ones_like(p)
    optimizer.clip_grad_norm_(10.0)
    assert "momentum_buffer" not in optimizer.state_dict()["state"].get(0, {})
    optimizer.step()
    assert torch.equal(p.detach(), -torch.ones_like(p))  # no dampening of the first


def test_a_first_step_that_is_left_out_leaves_no_buffer(backend, device):
    """Neither in a checkpoint nor for the next plan: what comes then still is the first step."""
    for again in ("loaded", "planned anew"):
        (p,) = params = [torch.nn.Parameter(torch.zeros(3, device=device))]
        optimizer = fusedopt.SGD(params, lr=1.0, momentum=0.9, dampening=0.5, backend=backend)
        p.grad = torch.ones_like(p)
        optimizer.clip_grad_norm_(10.0)
        optimizer.zero_grad()
        if again == "loaded":
            optimizer.load_state_dict(optimizer.state_dict())
        else:
            optimizer.max_grad_value = 2.0
        p.grad = torch.ones_like(p)
        optimizer.step()
        assert torch.equal(p.detach(), -torch.ones_like(p))  # no dampening of the first


@pytest.mark.parametrize("name", ["ASGD", "Rprop"])
def test_states_begin_at_the_learning_rate_of_the_step(name, backend, device):
    """Not at that of the clipping before it."""
    pair = Pair(name, None, "tiny", device=device, backend=backend)
    for number in range(3):
        give_both(pair, number)
        clip_by_torch(pair, 0.5)
        pair.opt.clip_grad_norm_(0.5)
        for group in (*pair.opt.param_groups, *pair.oracle.param_groups):
            group["lr"] *= 0.5
        pair.opt.step()
        pair.oracle.step()
    pair.check()


def test_a_step_that_is_left_out(backend, device):
    """As torch's scaler leaves it out: gradients that backward then adds to are judged anew."""
    (p,) = params = [torch.nn.Parameter(torch.zeros(4, device=device))]
    optimizer = fusedopt.SGD(params, lr=1.0, backend=backend)
    p.grad = torch.full_like(p, 3.0)
    assert float(optimizer.clip_grad_norm_(1.0)) == 6.0
    p.grad.add_(1.0)
    assert float(optimizer.clip_grad_norm_(1.0)) == 8.0
    optimizer.step()
    torch.testing.assert_close(p.detach(), torch.full_like(p, -0.5))


def test_a_scaler_clips_for_others_too(device):
    """An optimizer that is not ours, sparse gradients, and a scaler that is not enabled."""
    for optim in (torch.optim.SGD, fusedopt.SGD):
        for enabled in (True, False):
            p = torch.nn.Parameter(torch.zeros(4, device=device))
            optimizer = optim([p], lr=1.0)
            scaler, _ = scalers(device, enabled=enabled)
            (scaler.scale(p * 3).sum()).backward()
            assert float(scaler.clip_grad_norm_(optimizer, 1.0)) == pytest.approx(6.0)
            scaler.step(optimizer)
            scaler.update()
            torch.testing.assert_close(p.detach(), torch.full_like(p, -0.5))
