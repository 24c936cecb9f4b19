"""Meshes of two dimensions and several meshes: each element's square counts once, however many replicas there are."""

import functools

import pytest
import torch
import torch.distributed as dist
from sharding import counted, sharded
from thinning import every_value
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from training import (
    build_for,
    clip,
    close,
    full,
    loss_of,
    net,
    ours,
    part,
    same_on_all_ranks,
    single_process,
    theirs,
    train,
    weights,
)

import fusedopt


@functools.cache
def mesh(*shape, names=("dp", "tp")):
    return init_device_mesh("cpu", shape, mesh_dim_names=names[: len(shape)])


def norm_is_that_of_one_process(optimizer, reference, number):
    """``grad_norm`` before the step that ``reference`` is about to take."""
    reference.zero_grad()
    loss_of(reference, number, split=lambda x: x).backward()
    exact = torch.nn.utils.get_total_norm([p.grad.double() for p in reference.parameters()])
    # float32 gradients from sums over the batch in another order.
    torch.testing.assert_close(optimizer.grad_norm.double(), exact, rtol=1e-6, atol=0)


@pytest.mark.ranks(4)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_hybrid_sharding(backend):
    build = build_for(backend)
    model = sharded(build, mesh=mesh(2, 2))
    optimizer = ours(model, backend=backend)
    with counted(optimizer) as calls:
        train(model, optimizer, steps=3)
    assert calls == [2] * 3
    norm_is_that_of_one_process(optimizer, single_process(steps=2, build=build), 2)
    close(weights(model), weights(single_process(steps=3, build=build)))
    same_on_all_ranks([*weights(model), optimizer.grad_norm])


class Wide(nn.Module):
    """Sizes that tensor parallelism can divide, and a parameter that it leaves alone."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(7, 34)
        self.second = nn.Linear(34, 5)
        self.gain = nn.Parameter(torch.full((1,), 3.0))

    def forward(self, x):
        return self.gain * self.second(torch.tanh(self.first(x)))


def tensor_parallel_and_sharded(grid):
    model = net(Wide)
    parallelize_module(model, grid["tp"], {"first": ColwiseParallel(), "second": RowwiseParallel()})
    for layer in (model.first, model.second, model):
        fully_shard(layer, mesh=grid["dp"])
    return model


@pytest.mark.ranks(4)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_sharding_with_tensor_parallelism(backend):
    """Parameters on dp and on (dp, tp): two meshes, over which torch's clip_grad_norm_ raises."""
    grid = mesh(2, 2)
    model = tensor_parallel_and_sharded(grid)
    assert {p.device_mesh.ndim for p in model.parameters()} == {1, 2}
    optimizer = ours(model, backend=backend)
    split = functools.partial(part, group=grid.get_group("dp"))
    with counted(optimizer) as calls:
        train(model, optimizer, steps=3, split=split)
    # Per step: the sums of both, and found_inf, over dp; what is also spread over tp, and found_inf, over tp.
    assert len(calls) == 6 and max(calls) <= 4
    norm_is_that_of_one_process(optimizer, single_process(steps=2, build=Wide), 2)
    close(weights(model), weights(single_process(steps=3, build=Wide)))
    same_on_all_ranks([*weights(model), optimizer.grad_norm])


@every_value
@pytest.mark.ranks(4)
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("parallel", ["hybrid", "with tensor parallelism"])
def test_nan_in_one_part_of_the_batch_skips_on_all(parallel, backend):
    """Parameters that are spread over one dimension only belong to the verdict of all ranks too. Either backend with
    one layout: what ranks exchange is made by the same code, and test_fsdp2_faults has each with each setting."""
    grid = mesh(2, 2)
    model = sharded(mesh=grid) if parallel == "hybrid" else tensor_parallel_and_sharded(grid)
    split = part if parallel == "hybrid" else functools.partial(part, group=grid.get_group("dp"))
    optimizer = ours(model, backend=backend, skip_nonfinite=True)
    train(model, optimizer, steps=2, split=split)
    before = [w.clone() for w in weights(model)]
    optimizer.zero_grad()
    bad = float("nan") if grid.get_local_rank("dp") == 1 else 1.0
    loss_of(model, 2, split=lambda x: bad * split(x)).backward()
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert all(map(torch.equal, before, weights(model)))
    train(model, optimizer, steps=1, start=3, split=split)
    assert not any(map(torch.equal, before, weights(model)))
    same_on_all_ranks(weights(model))


class Sequence(nn.Module):
    """Over the tokens of a sequence: its normalization works on this rank's tokens, so that its gradients are sums
    still to be taken over the ranks (Partial)."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(6)
        self.first = nn.Linear(6, 8)
        self.second = nn.Linear(8, 6)

    def forward(self, x):
        return self.second(torch.tanh(self.first(self.norm(x))))


@pytest.mark.ranks(2)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_sequence_parallelism(backend):
    tp = mesh(2, names=("tp",))
    plan = {
        "norm": SequenceParallel(sequence_dim=1),
        "first": ColwiseParallel(input_layouts=Shard(1)),
        "second": RowwiseParallel(output_layouts=Replicate()),
    }
    model = parallelize_module(net(Sequence), tp, plan)
    reference = net(Sequence)
    optimizer = ours(model, backend=backend)
    expected = theirs(reference)
    for number in range(3):
        x = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(number))
        for m in (model, reference):
            m.zero_grad()
            # The normalization takes each rank's part of the sequence.
            m(x if m is reference else part(x, dim=1)).square().sum().backward()
        assert model.norm.weight.grad.placements == (Partial(),)
        before = model.norm.weight.grad
        optimizer.step()
        assert model.norm.weight.grad is before and before.placements == (Partial(),)
        norm = clip(reference)
        torch.testing.assert_close(optimizer.grad_norm, norm, rtol=1e-6, atol=0)
        expected.step()
    close(weights(model), weights(reference))
    same_on_all_ranks([*weights(model), optimizer.grad_norm])


@pytest.mark.ranks(4)
def test_tensors_distributed_by_hand():
    """Every placement at once: replicated, over either dimension, over both, and plain."""
    grid = mesh(2, 2)
    layouts = [
        (grid, [Replicate(), Replicate()]),
        (grid, [Shard(0), Replicate()]),
        (grid, [Replicate(), Shard(1)]),
        (grid, [Shard(0), Shard(1)]),
        (grid, [Shard(1), Shard(1)]),
        (grid["dp"], [Shard(0)]),
        (grid["tp"], [Shard(1)]),
        None,
    ]
    values = [torch.randn(5, 7, generator=torch.Generator().manual_seed(k)) for k in range(2 * len(layouts))]

    def arranged(value, layout):
        return value.clone() if layout is None else distribute_tensor(value, *layout)

    params = [nn.Parameter(arranged(v, layout)) for v, layout in zip(values, layouts)]
    reference = [nn.Parameter(v.clone()) for v, _ in zip(values, layouts)]
    settings = {"lr": 0.1, "momentum": 0.9, "max_grad_norm": 1.0}
    optimizer = fusedopt.SGD(params, **settings)
    expected = fusedopt.SGD(reference, **settings)
    for number in range(3):
        for p, q, g, layout in zip(params, reference, values[len(layouts) :], layouts):
            p.grad, q.grad = arranged(g * (number + 1), layout), g * (number + 1)
        optimizer.step()
        expected.step()
    torch.testing.assert_close(optimizer.grad_norm, expected.grad_norm, rtol=1e-6, atol=0)
    close(map(full, params), map(full, reference))
    same_on_all_ranks([optimizer.grad_norm])


@pytest.mark.ranks(4)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_random_bits_are_those_of_one_process(backend):
    """Where a shard begins at a multiple of eight elements; replicas have the same."""
    grid, found = mesh(2, 2), []
    layouts = {
        (16, 8): [Shard(0), Shard(0)],
        (5, 16): [Replicate(), Shard(0)],
        (16,): [Shard(0), Replicate()],
        (3, 8): [Replicate(), Replicate()],
    }
    for place in (lambda x: x, lambda x: distribute_tensor(x, grid, layouts[tuple(x.shape)])):
        ones = [place(torch.ones(shape, dtype=torch.bfloat16)) for shape in layouts]
        params = [nn.Parameter(x.clone()) for x in ones]
        options = {"lr": 1e-3, "master": "stochastic", "state_dtype": torch.bfloat16, "backend": backend}
        optimizer = fusedopt.AdamW(params, **options)
        for _ in range(3):
            for p, x in zip(params, ones):
                p.grad = x.clone()
            optimizer.step()
        found.append([full(x) for p in params for x in (p, optimizer.state[p]["exp_avg_sq"])])
    assert all(map(torch.equal, *found))
    assert len(found[0][0].unique()) > 1  # rounded at random


@pytest.mark.ranks(4)
def test_pipeline_stages_share_a_norm_through_clip_group():
    """Ranks 0, 1 hold the first stage and ranks 2, 3 the second, each sharded over its two ranks."""
    grid = mesh(2, 2, names=("pp", "dp"))
    stage = grid.get_local_rank("pp")
    model = nn.Linear(3, 5 + stage)
    fully_shard(model, mesh=grid["dp"])
    optimizer = fusedopt.SGD(model.parameters(), lr=0.1, max_grad_norm=1.0, clip_group=grid["pp"])
    for p in model.parameters():
        p.grad = torch.full_like(p, 2.0 + stage)
    with counted(optimizer) as calls:
        optimizer.step()
    assert len(calls) == 2
    assert float(optimizer.grad_norm) == pytest.approx((20 * 4 + 24 * 9) ** 0.5, rel=1e-6)
    same_on_all_ranks([optimizer.grad_norm])


@pytest.mark.ranks(2)
def test_a_parameter_that_is_a_sum_still_to_be_taken_is_refused():
    from torch.distributed.tensor import DTensor

    p = nn.Parameter(DTensor.from_local(torch.ones(3), mesh(2, names=("tp",)), [Partial()]))
    optimizer = fusedopt.SGD([p], lr=0.1)
    p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match="redistribute the parameter"):
        optimizer.step()


@pytest.mark.ranks(4)
def test_a_gradient_on_another_mesh_is_refused():
    grid = mesh(2, 2)
    p = nn.Parameter(distribute_tensor(torch.ones(4), grid["dp"], [Shard(0)]))
    optimizer = fusedopt.SGD([p], lr=0.1)
    with pytest.raises(RuntimeError, match="the gradient of parameter 0 lies on"):
        p.grad = distribute_tensor(torch.ones(4), grid["tp"], [Shard(0)])
        optimizer.step()
    assert dist.get_world_size() == 4
