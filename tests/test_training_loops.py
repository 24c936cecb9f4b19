"""Training loops: closures, schedulers, gradient scalers and torch.compile behave as with torch.optim."""

import inspect
import warnings

import pytest
import torch
from cases import LR, TENSOR_LR, every_optimizer, every_optimizer_and_backend, give_gradients, model
from pairs import Pair, clip
from torch.optim import lr_scheduler

import fusedopt


@every_optimizer_and_backend
def test_closure(name, backend, device):
    pair = Pair(name, None, "tiny", device=device, groups=False, backend=backend)

    def closure_of(optimizer, params):
        def closure():
            assert torch.is_grad_enabled()
            optimizer.zero_grad()
            loss = sum((p * p).sum() for p in params)
            loss.backward()
            return loss

        return closure

    for enabled in (True, False, True):
        with torch.set_grad_enabled(enabled):
            loss = pair.opt.step(closure_of(pair.opt, pair.ours))
            expected = pair.oracle.step(closure=closure_of(pair.oracle, pair.theirs))
        # Sums of a hundred squares in float64.
        torch.testing.assert_close(loss, expected, rtol=1e-13, atol=0)
    pair.check()

    def broken():
        raise KeyError("of the user")

    with pytest.raises(KeyError, match="of the user"):
        pair.opt.step(broken)
    pair.step(2)
    pair.check()


@every_optimizer
@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(name, set_to_none):
    pair = Pair(name)
    pair.step(2)
    kept = [p.grad for p in pair.ours]
    for optimizer, params in ((pair.opt, pair.ours), (pair.oracle, pair.theirs)):
        for p in params:
            p.grad = None if p.grad is None else p.grad.clone()
        optimizer.zero_grad(set_to_none=set_to_none)
        optimizer.step()
    # A gradient of zero still decays and counts; none leaves alone.
    for p, g in zip(pair.ours, kept):
        assert (p.grad is None) == (set_to_none or g is None)
        assert p.grad is None or not p.grad.any()
    pair.check()


SCHEDULERS = {
    "LambdaLR": lambda opt: lr_scheduler.LambdaLR(opt, lambda epoch: 0.9**epoch),
    "OneCycleLR": lambda opt: lr_scheduler.OneCycleLR(opt, 0.1, total_steps=9, cycle_momentum=cycles(opt)),
    "ReduceLROnPlateau": lambda opt: lr_scheduler.ReduceLROnPlateau(opt, patience=1, factor=0.3),
}


def cycles(optimizer):
    return not isinstance(optimizer, torch.optim.Adagrad)  # which has no momentum to cycle


@every_optimizer_and_backend
@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("tensor", [False, True], ids=["float lr", "tensor lr"])
def test_schedulers(name, scheduler, tensor, backend, device):
    pair = Pair(name, None, "tiny", device=device, groups=False, backend=backend)
    if tensor:
        for optimizer in (pair.opt, pair.oracle):  # an object for each: schedulers write to it
            optimizer.param_groups[0]["lr"] = TENSOR_LR.clone()
    ours, theirs = SCHEDULERS[scheduler](pair.opt), SCHEDULERS[scheduler](pair.oracle)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # "lr_scheduler.step() before optimizer.step()", for one
        for _ in range(6):
            pair.step()
            for each in (ours, theirs):
                each.step(1.0) if scheduler == "ReduceLROnPlateau" else each.step()
    assert ours.get_last_lr() == theirs.get_last_lr()
    assert float(ours.get_last_lr()[0]) != LR
    pair.check()


@every_optimizer_and_backend
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("settings", [{}, {"max_grad_norm": 3.0, "max_grad_value": 0.4}], ids=["plain", "clip"])
def test_grad_scaler(name, fused, settings, backend, device):
    """``fused=True``: the scaler leaves unscaling and the check to step(). The oracle never sees the bad steps."""
    if fused and "fused" not in inspect.signature(getattr(torch.optim, name)).parameters:
        pytest.skip("torch refuses fused=True")
    if fused and name == "RMSprop":
        pytest.skip("torch has no fused RMSprop")
    pair = Pair(name, None, "tiny", device=device, backend=backend, **settings, **({"fused": True} if fused else {}))
    # A power of two, which scaling divides out exactly.
    scaler = torch.amp.GradScaler(device.type, init_scale=8.0, growth_interval=1000)
    for number in range(6):
        give_gradients(pair.ours, number, plain=True)
        give_gradients(pair.theirs, number, plain=True)
        scaler.scale(torch.zeros((), device=device))
        for p in pair.ours:
            if p.grad is not None:
                p.grad *= scaler.get_scale()
        bad = number in (0, 3)
        if bad:
            pair.ours[1].grad[0, 0] = float("inf")
        scaler.step(pair.opt)
        scaler.update()
        if not bad:
            clip(pair.theirs, pair.opt)
            pair.oracle.step()
    assert scaler.get_scale() == 2.0
    pair.check()


@every_optimizer
def test_unscale_by_hand(name, device):
    """scaler.unscale_, then torch's own clipping, then step: the usual loop."""
    pair = Pair(name, None, "tiny", device=device)
    scaler = torch.amp.GradScaler(device.type, init_scale=8.0, growth_interval=1000)
    for number in range(4):
        give_gradients(pair.ours, number, plain=True)
        give_gradients(pair.theirs, number, plain=True)
        scaler.scale(torch.zeros((), device=device))
        for p in pair.ours:
            if p.grad is not None:
                p.grad *= 8
        scaler.unscale_(pair.opt)
        for params in (pair.ours, pair.theirs):
            torch.nn.utils.clip_grad_norm_(params, 2.0, foreach=False)
        scaler.step(pair.opt)
        scaler.update()
        pair.oracle.step()
    pair.check()


def test_compiled_training_step(device):
    """One graph break at step(); ``backend="eager"`` traces as every backend does, and needs no C++ compiler."""
    pair = Pair("Adam", None, "tiny", device=device, groups=False, max_grad_norm=2.0)

    def loss_of(params):
        return sum((p * p).sum() for p in params)

    compiled_loss = torch.compile(loss_of, backend="eager")

    @torch.compile(backend="eager")
    def train(optimizer, params):
        optimizer.zero_grad()
        loss_of(params).backward()
        optimizer.step()

    for number in range(4):
        for p in pair.theirs:
            p.grad = None
        loss_of(pair.theirs).backward()
        clip(pair.theirs, pair.opt)
        pair.oracle.step()
        if number % 2:
            train(pair.opt, pair.ours)
        else:
            pair.opt.zero_grad()
            compiled_loss(pair.ours).backward()
            pair.opt.step()
    pair.check()


def test_step_of_a_subclass_runs_once_when_compiled():
    class Counting(fusedopt.SGD):
        calls = 0

        def step(self, closure=None):
            self.calls += 1
            return super().step(closure)

    params = model("tiny")
    optimizer = Counting(params, lr=0.1)
    give_gradients(params, 5)
    torch.compile(lambda: optimizer.step(), backend="eager")()
    assert optimizer.calls == 1
