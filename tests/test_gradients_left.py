"""What a step leaves of gradients, and what else it could disturb."""

import pytest
import torch
from cases import every_torch_optimizer

import fusedopt


def parameters(dtype=torch.float32, count=2):
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(200, 200, generator=generator, dtype=dtype)) for _ in range(count)]


OPTIONS = {
    "SGD": [{}, {"momentum": 0.9}, {"weight_decay": 0.1}],
    "RMSprop": [{"centered": c, "momentum": m} for c in (False, True) for m in (0.0, 0.9)],
    "Adam": [{}, {"amsgrad": True}],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@every_torch_optimizer
def test_without_clipping_gradients_stay(name, dtype):
    for options in OPTIONS.get(name, [{}]):
        params = parameters(dtype)
        optimizer = fusedopt.registry[name](params, lr=0.01, **options)
        given = [torch.randn_like(p) for p in params]
        for p, g in zip(params, given):
            p.grad = g.clone()
        for _ in range(3):
            optimizer.step()
        assert all(torch.equal(p.grad, g) for p, g in zip(params, given)), options


@every_torch_optimizer
def test_a_gradient_of_two_parameters_is_clipped_once(name):
    for options in OPTIONS.get(name, [{}]):
        moved = []
        for shared in (True, False):
            params = [torch.nn.Parameter(torch.zeros(200, 200)) for _ in range(2)]
            optimizer = fusedopt.registry[name](params, lr=0.01, max_grad_norm=1.0, **options)
            for _ in range(2):
                params[0].grad = torch.full((200, 200), 8.0)
                params[1].grad = params[0].grad if shared else params[0].grad.clone()
                optimizer.step()
            moved.append([p.detach() for p in params])
        assert all(map(torch.equal, *moved)), options


@every_torch_optimizer
def test_autograd_knows_of_clipped_gradients(name):
    """Where the content of a gradient has changed, going back through it is an error, as after clip_grad_norm_."""
    (p,) = parameters(count=1)
    x = torch.randn(200, 200, requires_grad=True)
    optimizer = fusedopt.registry[name]([p], lr=0.01, max_grad_norm=1.0)
    p.grad = x * x
    before, penalty = p.grad.detach().clone(), (p.grad**2).sum()
    optimizer.step()
    if torch.equal(p.grad, before):
        return
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        penalty.backward()


@every_torch_optimizer
def test_a_step_in_inference_mode_disturbs_no_other(name):
    p, q = parameters()
    options = {"centered": True} if name == "RMSprop" else {}
    for x, mode in ((p, True), (q, False)):
        optimizer = fusedopt.registry[name]([x], lr=0.01, **options)
        x.grad = torch.ones_like(x)
        with torch.inference_mode(mode):
            optimizer.step()
        optimizer.step()
    assert not q.is_inference()


@pytest.mark.usefixtures("needs_triton")
@pytest.mark.parametrize("settings", [{"max_grad_norm": 99.0, "skip_nonfinite": True}, {"capturable": True}], ids=str)
def test_tables_of_a_step_in_inference_mode_serve_others(settings, device):
    """Those of its first step, and of one with another set of gradients and a copy of a parameter with gaps."""
    params = [torch.nn.Parameter(x[:, 0]) for x in torch.ones(2, 5, 2, device=device)]
    optimizer = fusedopt.AdamW(params, lr=0.1, backend="triton", **settings)
    for number in range(6):
        params[0].grad = torch.ones_like(params[0])
        params[1].grad = torch.ones_like(params[1]) if number in (2, 3) else None
        with torch.inference_mode(number % 2 == 0):
            optimizer.step()
    expected = []
    for count in (6, 2):
        p = torch.nn.Parameter(torch.ones(5))
        alone = torch.optim.AdamW([p], lr=0.1)
        for _ in range(count):
            p.grad = torch.ones_like(p)
            alone.step()
        expected.append(p)
    for p, q in zip(params, expected):
        torch.testing.assert_close(p.cpu(), q, rtol=1e-6, atol=1e-6)
