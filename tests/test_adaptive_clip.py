"""Adaptive gradient clipping, by units, against the formula as timm's ``adaptive_clip_grad`` writes it."""

import math

import pytest
import torch
from cases import clip_settings, every_optimizer_and_backend, give_gradients, interpreter_noise, kinds, laid_out, model
from pairs import Pair, assert_same, clip, snapshot
from rule_cases import parameters, set_gradients, tensors
from test_metrics import AT_ONCE, variants
from thinning import every_pair

import fusedopt
from fusedopt import units


def norm_of_units(x):
    dims = tuple(range(1, x.dim())) if x.dim() > 1 else tuple(range(x.dim()))
    return x.square().sum(dims, keepdim=True).sqrt() if dims else x.abs()


def literal(p, g, clipping, eps=1e-3):
    """Brock et al., arXiv 2102.06171, equation 3."""
    if not p.numel():
        return g
    largest = norm_of_units(p).clamp(min=eps) * clipping
    norm = norm_of_units(g)
    return torch.where(norm > largest, g * (largest / norm), g)


@every_optimizer_and_backend
def test_every_optimizer(name, backend, device):
    """Alone, and between the clip of the norm over all, which it does not change, and that of components."""
    for kind in kinds(backend, device):
        for settings in ({}, clip_settings("both", kind)):
            pair = Pair(name, None, kind, device=device, start=0, backend=backend, adaptive_grad_clip=0.45, **settings)
            bound = 0
            for _ in range(3):
                give_gradients(pair.ours, pair.number)
                give_gradients(pair.theirs, pair.number, plain=True)
                norm = torch.stack([p.grad.norm() for p in pair.theirs if p.grad is not None]).norm()
                pair.opt.step()
                limits, pair.opt.max_grad_value = pair.opt.max_grad_value, None
                clip(pair.theirs, pair.opt)
                for p in pair.theirs:
                    if p.grad is not None:
                        clipped = literal(p.detach(), p.grad, 0.45)
                        bound += not torch.equal(clipped, p.grad)
                        p.grad.copy_(clipped)
                pair.opt.max_grad_value = limits
                clip(pair.theirs, pair.opt)
                pair.oracle.step()
                pair.number += 1
                if settings:
                    torch.testing.assert_close(pair.opt.grad_norm, norm, rtol=1e-12, atol=0)
            assert bound
            pair.check()


pytestmark = interpreter_noise

LAYOUTS = {
    "rows of several tiles": ((2, 2100), ""),
    "rows shorter than a tile": ((30, 37), ""),
    "transposed": ((20, 37), "transposed"),
    "tall transposed": ((130, 10), "transposed"),
    "one row": ((1, 1100), ""),
    "one column": ((60, 1), ""),
    "channels_last": ((5, 3, 4, 6), "channels_last"),
    "gaps": ((10, 40), "gaps"),
    "vector": ((1300,), ""),
    "scalar": ((), ""),
    "empty": ((0, 3), ""),
    "empty rows": ((4, 0), ""),
}


@every_pair
@pytest.mark.parametrize(("part", "small"), [(1024, False), (units.PART, True)])
@variants
def test_layouts(backend, settings, part, small, device, monkeypatch):
    """Units in one piece of memory and in many, of several programs, tiles and blocks. Some are clipped, some not; some
    have no size of their own, and some no gradient. A few roundings of float32."""
    monkeypatch.setattr(units, "PART", part)
    if backend == "triton":
        from fusedopt import triton_units

        monkeypatch.setattr(triton_units, "PART", part)
    sizes = [shape for shape, _ in LAYOUTS.values()]
    values = [laid_out(x, layout) for x, (_, layout) in zip(tensors(sizes, "cpu"), LAYOUTS.values())]
    params = [torch.nn.Parameter((1e-5 * x if small else x).to(device)) for x in values]
    del values
    made = fusedopt.SGD(params, lr=1.0, adaptive_grad_clip=0.5, backend=backend, **settings)
    grads = tensors(sizes, device, seed=1, scale=1e-3 if small else 0.5)
    for g in grads[:2]:
        g[0] = 0.0
    grads[0] = torch.cat([grads[0].flatten(), grads[0].new_zeros(1)])[1:].view(2, 2100)  # 4 bytes off
    grads[0] = grads[0].contiguous() if small else grads[0]
    grads[2] = grads[2].t().contiguous().t()
    set_gradients(params, grads)
    for _ in range(1 if small else 2):
        total = torch.stack([g.double().norm() for g in grads]).norm()
        factor = 1.0 if made.max_grad_norm is None else min(1.0, made.max_grad_norm / (total + 1e-6))
        expected = [
            p.detach().double() - literal(p.detach().double(), factor * g.double(), 0.5) for p, g in zip(params, grads)
        ]
        made.step()
        for name, p, wanted in zip(LAYOUTS, params, expected):
            torch.testing.assert_close(
                p.detach().double(), wanted, rtol=1e-6, atol=1e-10 if small else 1e-6, msg=lambda m, n=name: f"{n}: {m}"
            )


@variants
def test_loss_scale_and_norms(backend, settings, device):
    """The gradient that is clipped is that without the scale; ``metrics`` has the norm before clipping, and of the
    update the one behind it."""
    params = [torch.nn.Parameter(p) for p in tensors([(20, 30), 40], device)]
    before = [p.detach().clone() for p in params]
    made = fusedopt.SGD(params, lr=1.0, adaptive_grad_clip=0.1, track="parameters", backend=backend, **settings)
    made.grad_scale = torch.full((1,), 2.0**12, device=device)
    grads = tensors([(20, 30), 40], device, seed=1, scale=0.1)
    total = torch.stack([g.double().norm() for g in grads]).norm()
    factor = 1.0 if made.max_grad_norm is None else min(1.0, made.max_grad_norm / total)
    set_gradients(params, [2.0**12 * g for g in grads])
    made.step()
    wanted = [literal(p.double(), factor * g.double(), 0.1) for p, g in zip(before, grads)]
    for p, start, step in zip(params, before, wanted):
        torch.testing.assert_close(p.detach().double(), start.double() - step, rtol=1e-6, atol=1e-6)
    for found, norms in zip(made.metrics, (grads, wanted)):
        torch.testing.assert_close(found.double(), torch.stack([x.double().norm() for x in norms]), rtol=1e-5, atol=0)


@variants
def test_nonfinite_gradients(backend, settings, device):
    """As the formula: a NaN makes its unit NaN; an infinite norm leaves nothing of finite elements."""
    if settings is AT_ONCE:
        settings = {**settings, "max_grad_norm": None, "skip_nonfinite": False, "launches": "auto"}
    (p,) = params = [torch.nn.Parameter(torch.ones(3, 4, device=device))]
    made = fusedopt.SGD(params, lr=1.0, adaptive_grad_clip=0.5, backend=backend, **settings)
    p.grad = torch.zeros_like(p)
    p.grad[0, 1], p.grad[1, 1], p.grad[1, 2] = math.nan, math.inf, 1.0
    made.step()
    assert p[0].isnan().all()
    assert p[1].isnan().tolist() == [False, True, False, False] and p[1, 2] == 1
    assert torch.equal(p[2].detach(), torch.ones(4, device=device))


def test_small_dtypes(backend, device):
    """Units are those of the numbers at hand, and the clipped gradient is not rounded before the rule."""
    ends = []
    for dtype in (torch.bfloat16, torch.float32):
        params = [torch.nn.Parameter(p.detach().to(dtype)) for p in parameters([(10, 150), 33], device, torch.bfloat16)]
        made = fusedopt.SGD(params, lr=0.1, momentum=0.9, adaptive_grad_clip=0.3, backend=backend)
        made.state_dtype = torch.float32
        set_gradients(params, [g.to(dtype) for g in tensors([(10, 150), 33], device, torch.bfloat16, seed=1)])
        made.step()
        ends.append([made.state[p]["momentum_buffer"].detach().clone() for p in params])
    for narrow, wide in zip(*ends):
        torch.testing.assert_close(narrow, wide, rtol=1e-6, atol=0)


def test_skipped_steps(backend, device):
    params = model("tiny", torch.float32, device)
    made = fusedopt.Adam(params, adaptive_grad_clip=0.1, skip_nonfinite=True, backend=backend)
    give_gradients(params, 5)
    made.step()
    before = snapshot(made)
    give_gradients(params, 6)
    params[1].grad[0, 0] = math.nan
    made.step()
    assert made.skipped_steps == 1
    assert_same(before, snapshot(made))


def test_switched_on_and_off(backend, device):
    """At each step as if it had always been so."""
    (p,) = parameters([(4, 5)], device)
    made = fusedopt.SGD([p], lr=1.0, backend=backend)
    for clipping in (None, 0.1, 0.2, None):
        made.adaptive_grad_clip = clipping
        p.grad = torch.ones_like(p)
        wanted = p.detach() - (p.grad if clipping is None else literal(p.detach(), p.grad, clipping))
        made.step()
        torch.testing.assert_close(p.detach(), wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("flatten", [False, True])
def test_means_see_the_clipped_gradient(flatten, backend, device):
    """Weight decay into the gradient, so that the signs depend on how much is left of it."""
    ends = []
    for clipping in (0.1, None):
        params = [torch.nn.Parameter(p) for p in tensors([(20, 30), 40], device)]
        options = {"lr": 0.1, "weight_decay": 0.1, "momentum": 0.9, "flatten": flatten, "backend": backend}
        made = fusedopt.SGD(params, cautious=True, adaptive_grad_clip=clipping, **options)
        for t in range(2):
            grads = tensors([(20, 30), 40], device, seed=1 + t)
            set_gradients(params, grads if clipping else [literal(p.detach(), g, 0.1) for p, g in zip(params, grads)])
            made.step()
        ends.append([p.detach() for p in params])
    for a, b in zip(*ends):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_gradient_release(backend, device):
    """Needs no other parameter's gradient."""
    layer = torch.nn.Linear(3, 2).to(device)
    before = [p.detach().clone() for p in layer.parameters()]
    made = fusedopt.SGD(layer.parameters(), lr=1.0, adaptive_grad_clip=0.1, backend=backend)
    fusedopt.enable_gradient_release(layer, made)
    layer(torch.ones(1, 3, device=device)).sum().backward()
    for p, start in zip(layer.parameters(), before):
        wanted = start - literal(start, torch.ones_like(start), 0.1)
        torch.testing.assert_close(p.detach(), wanted, rtol=1e-6, atol=1e-6)


def test_bad_input(device):
    for value in (0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="Invalid adaptive_grad_clip"):
            fusedopt.Adam(model("tiny"), adaptive_grad_clip=value)
    for value in ("1", True, torch.tensor(1.0)):
        with pytest.raises(TypeError, match="adaptive_grad_clip must be a"):
            fusedopt.Adam(model("tiny"), adaptive_grad_clip=value)
    p = torch.nn.Parameter(torch.zeros(3, device=device))
    p.grad = torch.zeros(3, device=device).to_sparse()
    with pytest.raises(RuntimeError, match="adaptive_grad_clip cannot be combined with a sparse gradient"):
        fusedopt.SGD([p], adaptive_grad_clip=0.1).step()
