"""Training loops: closures, schedulers, gradient scalers and torch.compile behave as with torch.optim."""

import pytest
import torch
from cases import every_optimizer, every_optimizer_and_backend
from pairs import Pair


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
