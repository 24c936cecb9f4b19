"""DistributedDataParallel: gradients are whole on every rank, so is the norm, and no rank may differ by a bit."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from training import (
    Net,
    batch,
    build_for,
    clip,
    close,
    moved,
    net,
    ours,
    part,
    same_on_all_ranks,
    theirs,
    train,
    weights,
)

import fusedopt

OPTIONS = [
    {},
    {"accumulate": 3},
    {"static_graph": True},
    {"find_unused_parameters": True},
    {"set_to_none": False},
    {"bucket_cap_mb": 0.001},
    {"gradient_as_bucket_view": True},
    {"gradient_as_bucket_view": True, "accumulate": 3},
    {"gradient_as_bucket_view": True, "set_to_none": False, "static_graph": True},
    {"gradient_as_bucket_view": True, "find_unused_parameters": True, "bucket_cap_mb": 0.001},
]
"""Each alone, and those that go together."""


def label(options):
    return ",".join(f"{key}={value}" for key, value in options.items()) or "defaults"


class Unused(Net):
    """One parameter of which no step makes use, one that only every other batch uses."""

    def __init__(self):
        super().__init__()
        self.unused = nn.Linear(3, 5)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x) + (self.unused.bias if self.calls % 2 else 0)


@pytest.mark.ranks(2)
@pytest.mark.parametrize("settings", [{}, {"flatten": True}, {"flat_grads": True}], ids=label)
@pytest.mark.parametrize("options", OPTIONS, ids=label)
def test_trains_as_torch_does(options, settings):
    if "flat_grads" in settings and "find_unused_parameters" in options:
        return  # a gradient of zeros is not the same as none
    options = dict(options)
    loop = {key: options.pop(key) for key in ("accumulate", "set_to_none") if key in options}
    build = Unused if options.get("find_unused_parameters") else Net
    model, reference = (DistributedDataParallel(net(build), **options) for _ in range(2))
    optimizer = ours(model, **settings)
    train(model, optimizer, **loop)
    train(reference, theirs(reference), **loop, before_step=clip)
    # float32 rounding in another order of operations; see close().
    close(weights(model), weights(reference))
    assert build is Unused or moved(model.module)
    same_on_all_ranks([*weights(model), optimizer.grad_norm])


@pytest.mark.ranks(2)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_each_backend(backend):
    build = build_for(backend)
    model, reference = (DistributedDataParallel(net(build), gradient_as_bucket_view=True) for _ in range(2))
    optimizer = ours(model, backend=backend)
    train(model, optimizer, steps=3)
    train(reference, theirs(reference), steps=3, before_step=clip)
    close(weights(model), weights(reference))
    same_on_all_ranks([*weights(model), optimizer.grad_norm])


@pytest.mark.ranks(2)
def test_no_communication():
    """Gradients are whole on every rank: so is their norm."""
    model = DistributedDataParallel(net())
    optimizer = ours(model, skip_nonfinite=True)
    train(model, optimizer, steps=1)
    loss = (model(part(batch(1)[0])) ** 2).mean()
    loss.backward()
    if dist.get_rank() == 0:
        optimizer.step()  # would wait for the other rank


@pytest.mark.ranks(2)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nonfinite_on_one_rank_skips_on_all(value):
    model = DistributedDataParallel(net())
    optimizer = ours(model, skip_nonfinite=True)
    train(model, optimizer, steps=2)
    before = weights(model)
    before = [w.clone() for w in before]
    optimizer.zero_grad()
    x = part(batch(2)[0]) * (value if dist.get_rank() == 1 else 1.0)
    model(x).square().mean().backward()
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert all(map(torch.equal, before, weights(model)))
    train(model, optimizer, steps=1, start=3)
    assert moved(model.module)
    same_on_all_ranks(weights(model))


@pytest.mark.ranks(2)
def test_a_rank_without_gradients_steps_alone():
    """Without a wrapper, ranks may call step() with and without gradients: nobody waits for anybody."""
    model = net()
    optimizer = ours(model)
    if dist.get_rank() == 0:
        train(model, optimizer, steps=1, split=lambda x: x)
        assert optimizer.grad_norm > 0
    else:
        optimizer.step()
        assert optimizer.grad_norm == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_norm_does_not_depend_on_addresses(dtype):
    """Equal gradients at other addresses on each rank: one bit in the clip factor, and replicas drift apart."""
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(n, generator=generator).to(dtype) for n in (3, 70_001, 153, 1, 20_003)]
    norms = set()
    for number in range(100):
        params = [torch.nn.Parameter(torch.zeros_like(v)) for v in values]
        for p, v in zip(params, values):
            start = (number + p.numel()) % 8
            p.grad = torch.zeros(p.numel() + 8, dtype=dtype)[start : start + p.numel()].copy_(v)
        optimizer = fusedopt.SGD(params, lr=0.0, max_grad_norm=1.0)
        optimizer.step()
        norms.add(optimizer.grad_norm.item())
    assert len(norms) == 1
