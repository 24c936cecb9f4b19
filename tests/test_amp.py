"""fusedopt.GradScaler beside torch's: the same scales, steps and errors, without a pass of its own."""

import math
from unittest import mock

import pytest
import torch
from cases import every_optimizer_and_backend, give_gradients, model
from pairs import Pair, assert_same, clip, raised, same_bits, snapshot
from thinning import every_pair

import fusedopt

BAD = {0: math.inf, 3: math.nan, 4: -math.inf}
"""What some steps' gradients hold: the first step of all, and two in a row."""

# A scale that is no power of two would round; 4 steps make it grow, bad ones shrink.
ARGUMENTS = {"init_scale": 8.0, "growth_interval": 2, "growth_factor": 4.0}


def scalers(device, **arguments):
    arguments = ARGUMENTS | arguments
    return fusedopt.GradScaler(device.type, **arguments), torch.amp.GradScaler(device.type, **arguments)


def give_scaled_gradients(params, scaler, number):
    """What backward leaves of a scaled loss."""
    give_gradients(params, number, plain=True)
    scaler.scale(torch.zeros((), device=params[0].device))
    for p in params:
        if p.grad is not None:
            p.grad *= scaler.get_scale()
    if number in BAD:
        params[1].grad[0, 0] = BAD[number]


def no_pass():
    """Whoever makes torch's extra pass fails."""
    return mock.patch.object(torch, "_amp_foreach_non_finite_check_and_unscale_", side_effect=AssertionError("a pass"))


LOOPS = {
    "plain": {},
    "clip inside": {"max_grad_norm": 3.0, "max_grad_value": 0.4},
    "skip": {"skip_nonfinite": True},
}


@every_pair
@every_optimizer_and_backend
@pytest.mark.parametrize("loop", LOOPS)
def test_deferred(name, loop, backend, device):
    """No pass of its own, and parameters, states, step counts and the history of the scale are torch's."""
    pair = Pair(name, None, "tiny", device=device, backend=backend, **LOOPS[loop])
    ours, theirs = scalers(device)
    for number in range(8):
        give_scaled_gradients(pair.ours, ours, number)
        give_scaled_gradients(pair.theirs, theirs, number)
        before = [p.grad.clone() for p in pair.ours if p.grad is not None]
        with no_pass():
            assert ours.step(pair.opt) is None
        if backend == "triton":
            assert all(map(same_bits, before, [p.grad for p in pair.ours if p.grad is not None]))
        theirs.unscale_(pair.oracle)
        if number not in BAD:
            clip(pair.theirs, pair.opt)
        theirs.step(pair.oracle)
        ours.update()
        theirs.update()
        assert ours.state_dict() == theirs.state_dict()
        pair.opt.zero_grad()
    assert pair.opt.skipped_steps == len(BAD)
    assert ours.get_scale() != ARGUMENTS["init_scale"]
    pair.check()


@every_optimizer_and_backend
def test_unscaled_by_the_user(name, backend, device):
    """unscale_, then torch's own clipping, then step: gradients that the user looks at are unscaled at once."""
    pair = Pair(name, None, "tiny", device=device, backend=backend)
    ours, theirs = scalers(device)
    for number in range(8):
        for params, scaler, optimizer in ((pair.ours, ours, pair.opt), (pair.theirs, theirs, pair.oracle)):
            give_scaled_gradients(params, scaler, number)
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(params, 2.0, foreach=False)
            scaler.step(optimizer)
            scaler.update()
        assert ours.state_dict() == theirs.state_dict()
    pair.check()


@pytest.mark.parametrize("name", ["ASGD", "Rprop"])
def test_states_begin_at_the_rate_of_the_first_step_that_is_taken(name, backend, device):
    """Not at that of one before, which was skipped."""
    pair = Pair(name, None, "tiny", device=device, backend=backend)
    ours, theirs = scalers(device)
    for number in (0, 1, 2):
        for group in (*pair.opt.param_groups, *pair.oracle.param_groups):
            group["lr"] *= 0.5
        give_scaled_gradients(pair.ours, ours, number)
        give_scaled_gradients(pair.theirs, theirs, number)
        for scaler, optimizer in ((ours, pair.opt), (theirs, pair.oracle)):
            scaler.step(optimizer)
            scaler.update()
        assert any(pair.opt.state_dict()["state"].values()) == (number > 0)
    pair.check()


def test_states_that_were_given_are_kept_by_a_skipped_step(backend, device):
    params = model("tiny", device=device)
    optimizer = fusedopt.Rprop(params, lr=0.1, skip_nonfinite=True, backend=backend)
    for p in params:
        optimizer.state[p] = {"step": torch.tensor(0.0), "prev": torch.ones_like(p), "step_size": torch.ones_like(p)}
    give_gradients(params, 5, plain=True)
    params[1].grad[0, 0] = math.nan
    before = snapshot(optimizer)
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert_same(before, snapshot(optimizer))


def test_two_optimizers_and_one_of_torch(device):
    """One scaler, three optimizers, one of which is not ours: a bad gradient of one skips that one alone."""
    names = ["Adam", "SGD", "RMSprop"]
    pairs = [Pair(name, None, "tiny", device=device, groups=False) for name in names]
    pairs[2].opt = torch.optim.RMSprop(pairs[2].ours, **pairs[2].oracle.defaults)
    ours, theirs = scalers(device)
    for number in range(5, 9):
        for k, pair in enumerate(pairs):
            for params, scaler, optimizer in ((pair.ours, ours, pair.opt), (pair.theirs, theirs, pair.oracle)):
                give_scaled_gradients(params, scaler, number)
                if number == 6 and k == 1:
                    params[1].grad[1, 1] = math.nan
                scaler.step(optimizer)
        ours.update()
        theirs.update()
        assert ours.state_dict() == theirs.state_dict()
    assert [pair.opt.skipped_steps for pair in pairs[:2]] == [0, 1]
    close = [(a, b) for pair in pairs for a, b in zip(pair.ours, pair.theirs)]
    for a, b in close:
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_sparse_gradients_are_unscaled_by_torch(device):
    """A step that is not ours gets what torch's scaler would have made of the gradients."""
    ours, theirs = scalers(device)
    params = [torch.nn.Parameter(torch.ones(5, 2, device=device)) for _ in range(2)]
    optimizers = fusedopt.SGD(params[:1], lr=0.5), torch.optim.SGD(params[1:], lr=0.5)
    for bad in (False, True, False):
        for p, scaler, optimizer in zip(params, (ours, theirs), optimizers):
            scaler.scale(torch.zeros((), device=device))
            values = torch.full((2, 2), math.inf if bad else scaler.get_scale(), device=device)
            p.grad = torch.sparse_coo_tensor([[1, 3]], values, p.shape, check_invariants=False)
            scaler.step(optimizer)
            scaler.update()
        assert ours.state_dict() == theirs.state_dict()
        assert torch.equal(*params)
    assert params[0][1, 0] == 0
    assert optimizers[0].skipped_steps == 1


def test_what_torch_has_no_step_for_is_refused_before_it_is_unscaled(device):
    p = torch.nn.Parameter(torch.ones(3, dtype=torch.complex64, device=device))
    scaler, _ = scalers(device)
    scaler.scale(torch.zeros((), device=device))
    p.grad = torch.full_like(p, 8.0)
    with pytest.raises(RuntimeError, match="Lion cannot be combined with a complex parameter"):
        scaler.step(fusedopt.Lion([p]))
    assert torch.equal(p.grad, torch.full_like(p, 8.0))


def test_a_hook_may_drop_all_gradients(device):
    """Then nobody looks at them, and nothing was found."""
    p = torch.nn.Parameter(torch.ones(3, device=device))
    scaler, _ = scalers(device)
    optimizer = fusedopt.SGD([p], lr=0.5)
    optimizer.register_step_pre_hook(lambda *step: setattr(p, "grad", None))
    scaler.scale(torch.zeros((), device=device))
    p.grad = torch.ones_like(p)
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(p.detach(), torch.ones_like(p)) and scaler.get_scale() == ARGUMENTS["init_scale"]


def test_float16_gradients(device):
    """torch refuses to unscale them in place, which rounds; here nothing is written."""
    p = torch.nn.Parameter(torch.ones(5, dtype=torch.float16, device=device))
    scaler, _ = scalers(device, init_scale=2.0**15)
    scaler.scale(torch.zeros((), device=device))
    p.grad = torch.full_like(p, 2.0**-14)  # a subnormal of float16, once unscaled
    scaler.step(fusedopt.SGD([p], lr=2.0**28))
    assert torch.equal(p.detach(), torch.full_like(p, 0.5))


def test_disabled(device):
    params = model("tiny", device=device)
    optimizer = fusedopt.SGD(params, lr=0.1)
    scaler = fusedopt.GradScaler(device.type, enabled=False)
    give_gradients(params, 5, plain=True)
    before = params[1].detach().clone()
    scaler.step(optimizer)
    scaler.update()
    torch.testing.assert_close(params[1].detach(), before - 0.1 * params[1].grad, rtol=1e-12, atol=0)


def misuse_twice(scaler, optimizer):
    scaler.step(optimizer)
    scaler.step(optimizer)


MISUSES = {
    "two steps": misuse_twice,
    "closure": lambda scaler, optimizer: scaler.step(optimizer, closure=lambda: 0),
    "unscale twice": lambda scaler, optimizer: (scaler.unscale_(optimizer), scaler.unscale_(optimizer)),
    "unscale after step": lambda scaler, optimizer: (scaler.step(optimizer), scaler.unscale_(optimizer)),
    "update without step": lambda scaler, optimizer: scaler.update(),
    "no gradients": lambda scaler, optimizer: (optimizer.zero_grad(), scaler.step(optimizer)),
    "no gradients, unscaled": lambda scaler, optimizer: (
        optimizer.zero_grad(),
        scaler.unscale_(optimizer),
        scaler.step(optimizer),
    ),
}


@pytest.mark.parametrize("misuse", MISUSES)
def test_errors_are_torchs(misuse, device):
    errors = []
    for scaler, optim in zip(scalers(device), (fusedopt.Adam, torch.optim.Adam)):
        params = model("tiny", device=device)
        optimizer = optim(params)
        give_scaled_gradients(params, scaler, 5)
        errors.append(raised(lambda s=scaler, o=optimizer: MISUSES[misuse](s, o)))
    assert errors[0] is not None
    assert (type(errors[0]), str(errors[0])) == (type(errors[1]), str(errors[1]))


def test_a_step_that_raises_can_be_repeated(device):
    params = model("tiny", device=device)
    optimizer = fusedopt.Adam(params, max_grad_norm=1.0)
    scaler, _ = scalers(device)
    give_scaled_gradients(params, scaler, 5)
    good, params[1].grad = params[1].grad, torch.zeros_like(params[1]).to_sparse()
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match="max_grad_norm cannot be combined with a sparse gradient"):
        scaler.step(optimizer)
    assert_same(before, snapshot(optimizer))
    params[1].grad = good
    scaler.step(optimizer)
    scaler.update()
    assert all(state["step"] == 1 for state in optimizer.state.values() if state)
