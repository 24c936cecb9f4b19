"""Stopping criteria S1 to S4, alone and combined."""

import math

import pytest
import torch
from cases import every_optimizer, give_gradients, model
from thinning import every_value

import fusedopt
from fusedopt.stopping import Divergence, Iterations, LossBelow, SmallChange


def answers(stop, losses):
    return [stop(loss) for loss in losses]


def first(found):
    return found.index(True) + 1 if True in found else None


def test_iterations():
    stop = Iterations(3)
    assert answers(stop, [None] * 4) == [False, False, True, True]
    assert stop.reason == "4 iterations"


@pytest.mark.parametrize("as_loss", [float, torch.tensor, lambda x: torch.tensor([x], requires_grad=True)])
def test_loss_below(as_loss):
    stop = LossBelow(0.25)
    assert answers(stop, map(as_loss, [0.5, math.nan, 0.25, 0.3])) == [False, False, True, False]
    assert stop.reason is None
    assert first(answers(LossBelow(0.1, check_every=4), map(as_loss, [0.5, 0.05, 0.05, 0.2, 0.0, 0.0, 0.0, 0.0]))) == 8


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_divergence(bad):
    stop = Divergence(patience=3)
    assert answers(stop, [5.0, 6.0, 7.0, 6.5, 7.0, 8.0]) == [False] * 6
    assert stop(9.0) and stop.reason == "the loss rose 3 times in a row, to 9"
    assert not stop(9.0)  # it did not rise
    assert stop(bad) and str(bad) in stop.reason
    assert first(answers(Divergence(2, check_every=2), [9.0, 1.0, 0.0, 2.0, math.nan, 3.0])) == 6


@every_value
@pytest.mark.parametrize("check_every", [1, 2, 10])
@every_optimizer
def test_small_change(name, check_every, device):
    """The change of every looked-at step, whatever made it; the others cost nothing."""
    params = model("small", device=device)
    optimizer = fusedopt.registry[name](params, lr=0.01)
    stop = SmallChange(optimizer, tolerance=1e-4, check_every=check_every)
    stopped = []
    for t in range(1, 41):
        before = torch.cat([p.detach().flatten() for p in params])
        give_gradients(params, t)
        optimizer.step()
        if t > 17:  # as if the steps became small
            start = 0
            for p in params:
                part = before[start : start + p.numel()].view_as(p)
                p.data = part + (p.detach() - part) * 1e-6
                start += p.numel()
        change = (torch.cat([p.detach().flatten() for p in params]) - before).norm()
        assert stop() == (t % check_every == 0 and bool(change < 1e-4)), t
        assert bool(stop.before) == ((t + 1) % check_every == 0)
        stopped.append(stop.reason is not None)
    assert first(stopped) == {1: 18, 2: 18, 10: 20}[check_every]


@pytest.mark.parametrize("track", ["total", "parameters"])
def test_small_change_of_a_tracked_step(track, backend, device):
    """No copies: the step itself tells the norm, whatever others do to the parameters afterwards."""
    p = torch.nn.Parameter(torch.zeros(4, device=device))
    optimizer = fusedopt.SGD([p], lr=1.0, track=track, backend=backend)
    stop = SmallChange(optimizer, tolerance=1.0, check_every=2)
    assert not stop() and not stop() and not stop.before  # no step was taken yet
    for size, stops in ((0.5, False), (0.25, True), (0.75, False)):
        p.grad = torch.full_like(p, size)
        for _ in range(2):
            optimizer.step()
            p.data.add_(5.0)
            stopped = stop()
            assert not stop.before
        assert stopped == stops
        assert not stops or stop.reason == "the parameters changed by 0.5 < 1"
    optimizer.track = None
    assert not stop() and stop.before
    p.data.add_(0.25)
    assert stop() and stop.reason == "the parameters changed by 0.5 < 1"


@pytest.mark.parametrize("track", [None, "total"])
def test_a_skipped_step_is_no_small_change(track, backend, device):
    p = torch.nn.Parameter(torch.zeros(4, device=device))
    optimizer = fusedopt.SGD([p], lr=1.0, track=track, skip_nonfinite=True, backend=backend)
    stop = SmallChange(optimizer, tolerance=1.0, check_every=1)
    for size, stops in ((math.nan, False), (0.25, True), (math.inf, False), (0.75, False), (0.0, True)):
        p.grad = torch.full_like(p, size)
        optimizer.step()
        assert stop() == stops, size


def test_small_change_measures_what_it_says():
    params = [torch.nn.Parameter(torch.zeros(3, dtype=dtype)) for dtype in (torch.bfloat16, torch.complex64)]
    params.append(torch.nn.Parameter(torch.zeros(0)))
    optimizer = torch.optim.SGD(params, lr=1.0)  # of torch, too
    stop = SmallChange(optimizer, tolerance=1.0, check_every=1)
    params[0].grad, params[1].grad = torch.full_like(params[0], 0.25), torch.full_like(params[1], 0.25j)
    optimizer.step()
    assert stop() and stop.reason == f"the parameters changed by {math.sqrt(6 / 16):.3g} < 1"
    # New parameters have no step before to compare with.
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(2))]})
    assert not stop()
    assert stop()


def test_combined():
    """Whichever comes first; each counts its own steps, and all reasons are given."""
    losses = [0.5, 0.4, 0.3, 0.05, 0.3, 0.4, 0.5]
    make = {
        "iterations": lambda: Iterations(6),
        "loss": lambda: LossBelow(0.1),
        "divergence": lambda: Divergence(2),
    }
    for names, expected in {
        ("iterations", "loss", "divergence"): 4,
        ("iterations", "divergence"): 6,
        ("divergence", "iterations"): 6,
        ("loss", "iterations"): 4,
    }.items():
        stop = make[names[0]]()
        for name in names[1:]:
            stop = stop | make[name]()
        assert first(answers(stop, losses)) == expected
    both = Iterations(6) | (Divergence(2) | LossBelow(0.4))
    assert first(answers(both, losses)) == 2
    both = Iterations(6) | (LossBelow(-1.0) | Divergence(2))
    assert answers(both, losses[:6])[-1]
    assert both.reason == "6 iterations; the loss rose 2 times in a row, to 0.4"


def test_a_training_stops():
    """On a quadratic: S2 where it converges, S4 where the learning rate is too large."""
    reasons = []
    for lr in (0.1, 3.0):
        p = torch.nn.Parameter(torch.ones(4))
        optimizer = fusedopt.SGD([p], lr=lr)
        stop = Iterations(1000) | SmallChange(optimizer, 1e-4, check_every=5) | Divergence(5)
        while True:
            optimizer.zero_grad()
            loss = p.square().sum()
            loss.backward()
            optimizer.step()
            if stop(loss):
                break
        reasons.append(stop.reason)
    assert reasons[0].startswith("the parameters changed by") and reasons[1].startswith("the loss rose 5 times")


BAD = [
    (lambda o: Iterations(0), ValueError, "number: 0; give at least 1"),
    (lambda o: Iterations(2.5), TypeError, "number must be a whole number, got 2.5"),
    (lambda o: SmallChange(o, 0.0), ValueError, "tolerance: 0.0; give a number above zero"),
    (lambda o: SmallChange(o, math.nan), ValueError, "tolerance"),
    (lambda o: SmallChange(o, "1e-4"), TypeError, "tolerance"),
    (lambda o: SmallChange(o, check_every=0), ValueError, "check_every"),
    (lambda o: SmallChange(o.param_groups, 1.0), TypeError, "list is not an Optimizer"),
    (lambda o: LossBelow(math.inf), ValueError, "target"),
    (lambda o: Divergence(True), TypeError, "patience"),
    (lambda o: LossBelow(0.1)(), TypeError, "LossBelow looks at the loss"),
    (lambda o: (Iterations(5) | Divergence())(), TypeError, "Divergence looks at the loss"),
    (lambda o: Iterations(5) | 5, TypeError, "unsupported operand"),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call(fusedopt.SGD(model("tiny")))
