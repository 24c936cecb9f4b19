"""Means over whole parameters of which ranks hold parts: what needs them (``cautious=True``, ``StableAdamW``, ``LAMB``)
trains as in one process."""

import functools

import pytest
import torch
import torch.distributed as dist
from sharding import counted, sharded
from test_mesh import Wide, mesh, tensor_parallel_and_sharded
from thinning import every_value
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from training import (
    MAX_NORM,
    OPTIONS,
    Net,
    build_for,
    close,
    full,
    loss_of,
    moved,
    net,
    part,
    same_on_all_ranks,
    train,
    two_groups,
    weights,
)

import fusedopt

KINDS = {
    "cautious": functools.partial(fusedopt.AdamW, cautious=True),
    "StableAdamW": fusedopt.StableAdamW,
    "LAMB": fusedopt.LAMB,
    "both": functools.partial(fusedopt.StableAdamW, cautious=True),
}
TERMS = {"cautious": 1, "StableAdamW": 1, "LAMB": 2, "both": 2}

BACKENDS = pytest.mark.parametrize("backend", ["torch", "triton"])


def made(kind, model, **settings):
    return KINDS[kind](two_groups(model), **{**OPTIONS, "max_grad_norm": MAX_NORM, **settings})


def in_one_process(kind, steps, build=Net, **settings):
    model = net(build)
    train(model, made(kind, model, **settings), steps, split=lambda x: x)
    return model


@every_value
@pytest.mark.ranks(2)
@BACKENDS
@pytest.mark.parametrize("kind", KINDS)
def test_uneven_and_empty_shards(kind, backend):
    build = build_for(backend)
    model = sharded(build)
    assert 0 in [p._local_tensor.numel() for p in model.parameters()] or dist.get_rank() == 0
    optimizer = made(kind, model, backend=backend)
    with counted(optimizer) as calls:
        train(model, optimizer, steps=2)
    # Per step: the norm and found_inf; a row of means for each parameter.
    assert calls == [2, TERMS[kind] * len(weights(model))] * 2
    close(weights(model), weights(in_one_process(kind, 2, build)))
    assert moved(model)
    same_on_all_ranks(weights(model))


class Even(Net):
    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(7, 34), nn.LayerNorm(34), nn.Linear(34, 5)


@pytest.mark.ranks(2)
def test_without_clipping():
    """The means are all that ranks exchange."""
    model = sharded(Even)
    optimizer = made("cautious", model, max_grad_norm=None)
    with counted(optimizer) as calls:
        train(model, optimizer, steps=3)
    assert calls == [len(weights(model))] * 3
    close(weights(model), weights(in_one_process("cautious", 3, Even, max_grad_norm=None)))


@every_value
@pytest.mark.ranks(4)
@BACKENDS
@pytest.mark.parametrize("kind", ["cautious", "StableAdamW"])
def test_hybrid_sharding(kind, backend):
    """Replicas count once. Not every kind with every backend, as in test_uneven_and_empty_shards."""
    build = build_for(backend)
    model = sharded(build, mesh=mesh(2, 2))
    train(model, made(kind, model, backend=backend), steps=3)
    close(weights(model), weights(in_one_process(kind, 3, build)))
    same_on_all_ranks(weights(model))


@every_value
@pytest.mark.ranks(4)
@BACKENDS
@pytest.mark.parametrize("kind", ["cautious", "StableAdamW"])
def test_sharding_with_tensor_parallelism(kind, backend):
    """Some parameters are spread over one dimension of the mesh, some over both. Cases are chosen as above."""
    grid = mesh(2, 2)
    model = tensor_parallel_and_sharded(grid)
    optimizer = made(kind, model, backend=backend)
    train(model, optimizer, steps=3, split=functools.partial(part, group=grid.get_group("dp")))
    close(weights(model), weights(in_one_process(kind, 3, Wide)))
    same_on_all_ranks(weights(model))


@pytest.mark.ranks(4)
@BACKENDS
def test_every_placement(backend):
    """Replicated, over either dimension, over both, and plain; several blocks and tiles in one."""
    grid = mesh(2, 2)
    layouts = [[Replicate(), Replicate()], [Shard(0), Replicate()], [Replicate(), Shard(1)], [Shard(0), Shard(1)], None]
    shapes = [(5, 7), (5, 7), (5, 7), (41, 77), (5, 7)]
    generator = torch.Generator().manual_seed(0)
    values = [[torch.randn(s, generator=generator) for s in shapes] for _ in range(3)]

    def arranged(value, layout):
        return value.clone() if layout is None else distribute_tensor(value, grid, layout)

    params = [torch.nn.Parameter(arranged(v, layout)) for v, layout in zip(values[0], layouts)]
    reference = [torch.nn.Parameter(v.clone()) for v in values[0]]
    settings = {"lr": 0.1, "momentum": 0.9, "cautious": True}
    optimizer = fusedopt.SGD(params, **settings, backend=backend)
    expected = fusedopt.SGD(reference, **settings, backend="torch")
    for grads in values[1:]:
        for p, q, g, layout in zip(params, reference, grads, layouts):
            p.grad, q.grad = arranged(g, layout), g
        optimizer.step()
        expected.step()
    close(map(full, params), [q.detach() for q in reference])
    same_on_all_ranks(params)


@pytest.mark.ranks(2)
@BACKENDS
def test_a_rank_without_gradients_meets_the_others(backend):
    """Its part of each mean is nothing; the others divide by the whole parameter all the same."""
    params = [torch.nn.Parameter(distribute_tensor(torch.zeros(4, 3), mesh(2), [Shard(0)])) for _ in range(2)]
    optimizer = fusedopt.SGD(params, lr=1.0, cautious=True, backend=backend)
    if dist.get_rank() == 0:
        for p in params:
            p.grad = torch.ones_like(p)
    with counted(optimizer) as calls:
        optimizer.step()
    assert calls == [2]
    # Half of the elements agree: the step is twice as long.
    local = torch.full((2, 3), -2.0 if dist.get_rank() == 0 else 0.0)
    assert all(torch.equal(p._local_tensor, local) for p in params)


@pytest.mark.ranks(2)
@BACKENDS
def test_skipped_steps(backend):
    model = sharded(build_for(backend))
    optimizer = made("cautious", model, backend=backend, skip_nonfinite=True)
    train(model, optimizer, steps=2)
    before = [w.clone() for w in weights(model)]
    optimizer.zero_grad()
    loss_of(model, 2).backward()
    if dist.get_rank() == 1:
        model.first.weight.grad._local_tensor[0, 0] = float("nan")
    with counted(optimizer) as calls:
        optimizer.step()
    # Met all the same: a rank may have left it to its GPU to skip the step.
    assert len(calls) == 2 and optimizer.skipped_steps == 1
    assert all(map(torch.equal, before, weights(model)))
    train(model, optimizer, steps=1, start=3)
    assert not any(map(torch.equal, before, weights(model)))
    same_on_all_ranks(weights(model))


@every_value
@pytest.mark.ranks(2)
@BACKENDS
@pytest.mark.parametrize("storage", [{"state_dtype": torch.float32}, {"master": "fp32"}], ids=str)
def test_bfloat16_parameters(storage, backend):
    to_bfloat16 = lambda x: x.chunk(2)[dist.get_rank()].bfloat16()  # noqa: E731
    ends = []
    for name in (backend, "torch"):
        model = fully_shard(net(build_for(backend)).bfloat16())
        train(model, made("StableAdamW", model, backend=name, **storage), steps=2, split=to_bfloat16)
        ends.append(weights(model))
    # The same arithmetic, but for the order of additions, which may round to the neighbouring bfloat16.
    close(*ends, 2**-8)
    same_on_all_ranks(ends[0])


@pytest.mark.ranks(2)
def test_gradient_release_is_refused():
    model = sharded()
    optimizer = made("cautious", model, max_grad_norm=None)
    with pytest.raises(RuntimeError, match="means over whole parameters, for which all ranks meet"):
        fusedopt.enable_gradient_release(model, optimizer)
    optimizer.cautious = False
    fusedopt.enable_gradient_release(model, optimizer)
    optimizer.cautious = True
    with pytest.raises(RuntimeError, match="means over whole parameters"):
        loss_of(model, 0).backward()


@pytest.mark.ranks(2)
def test_pieces_of_a_flat_parameter_are_refused():
    """FSDP1 does not say where in its flat parameter a whole parameter begins and ends."""
    model = FullyShardedDataParallel(net(), device_id=torch.device("cpu"), use_orig_params=True)
    optimizer = made("cautious", model, clip_group="world")
    loss_of(model, 0).backward()
    with pytest.raises(RuntimeError, match="cautious of AdamW needs a mean over each whole parameter, and"):
        optimizer.step()
