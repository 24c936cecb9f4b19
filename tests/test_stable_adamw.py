"""StableAdamW beside torch-optimi's; the paper's algorithm stands in oracles.py, with which all tests compare it."""

import pytest
import torch
from cases import kernels_overflow, kinds, model
from options import LR
from pairs import Pair, close

import fusedopt


def give(params, number):
    """Gradients whose size changes a thousandfold from step to step, so that v lags behind them."""
    generator = torch.Generator().manual_seed(number)
    for p in params:
        values = torch.randn(p.shape, generator=generator, dtype=torch.float64) * (0.01, 10.0, 0.1)[number % 3]
        p.grad = torch.empty_like(p).copy_(values)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_as_in_optimi(weight_decay, backend, device):
    optimi = pytest.importorskip("optimi", reason="torch-optimi is not installed")
    for kind in kinds(backend, device):
        ours, theirs = model(kind, device=device), model(kind, device=device)
        options = {"lr": LR, "betas": (0.9, 0.95), "eps": 1e-5, "weight_decay": weight_decay}
        made = fusedopt.StableAdamW(ours, **options, backend=backend)
        # It divides by the elements, and so has NaN for none.
        oracle = optimi.StableAdamW([p for p in theirs if p.numel()], **options, foreach=False, triton=False)
        for number in range(5):
            give(ours, number)
            give(theirs, number)
            made.step()
            oracle.step()
        # float64 but for its eps^2, a tensor of the parameter's dtype, and its RMS, a Python number.
        close(ours, theirs, 1e-12)


def test_the_limit_binds(backend, device):
    """At the second step g is a thousand times as large as v knows: each element moves by lr / RMS at most."""
    pair = Pair("StableAdamW", {"weight_decay": 0.0}, "tiny", device=device, groups=False, backend=backend)
    for number in range(2):
        before = [p.detach().clone() for p in pair.ours]
        give(pair.ours, number)
        give(pair.theirs, number)
        pair.opt.step()
        pair.oracle.step()
    pair.check()
    moved = (pair.ours[1] - before[1]).detach().square().mean().sqrt() / LR
    # Without the limit the root of the mean square of u is near 1: g = 10, v = g^2 / 2.
    unlimited = fusedopt.AdamW(params := model("tiny", device=device), lr=LR, betas=(0.9, 0.99), weight_decay=0.0)
    for number in range(2):
        start = params[1].detach().clone()
        give(params, number)
        unlimited.step()
    assert 1.3 * moved < (params[1] - start).detach().square().mean().sqrt() / LR


def test_parameters_whose_gradient_was_always_zero(backend, device):
    p = torch.nn.Parameter(torch.ones(5, device=device))
    p.grad = torch.zeros_like(p)
    made = fusedopt.StableAdamW([p], eps=0.0, weight_decay=0.0, backend=backend)
    for _ in range(2):
        made.step()
    assert torch.equal(p.detach(), torch.ones_like(p))


@kernels_overflow
def test_a_gradient_whose_square_overflows(backend, device):
    """Its element stands still, behind an infinite v, and the others go on."""
    p = torch.nn.Parameter(torch.zeros(3, device=device))
    made = fusedopt.StableAdamW([p], lr=0.1, weight_decay=0.0, backend=backend)
    for size in (1e30, 1.0):
        p.grad = torch.tensor([size, 1.0, -1.0], device=device)
        made.step()
    assert p[0] == 0
    torch.testing.assert_close(p.detach()[1:], torch.tensor([-0.2, 0.2], device=device))


def test_with_cautious(backend, device):
    """Two stages with a mean of their own each; the mask is of u without the limit, which has no sign."""
    params = model("tiny", device=device)
    both = fusedopt.StableAdamW(params, lr=LR, weight_decay=0.1, cautious=True, backend=backend)
    expected = [p.detach().clone() for p in params]
    m, v = ([torch.zeros_like(p) for p in expected] for _ in range(2))
    for t in range(1, 5):
        give(params, t)
        for p, g, m_p, v_p in zip(expected, [p.grad for p in params], m, v):
            m_p += (1 - 0.9) / (1 - 0.9**t) * (g - m_p)
            v_p += (1 - 0.99) / (1 - 0.99**t) * (g * g - v_p)
            u = m_p / (v_p.sqrt() + 1e-6)
            mask = (u * g > 0).to(p.dtype)
            u = u * mask / mask.mean().clamp(min=1e-3) + 0.1 * p
            p -= LR * u / (g * g / v_p.clamp(min=1e-12)).mean().sqrt().clamp(min=1.0)
        both.step()
    # Four steps of two dozen roundings of 1.1e-16.
    close(params, expected, 1e-12)
