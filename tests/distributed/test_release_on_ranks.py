"""Gradient release on several ranks: inside backward, FSDP has reduced a gradient when it is there, and DDP has not."""

import warnings

import pytest
from sharding import sharded
from torch.nn.parallel import DistributedDataParallel
from training import build_for, close, loss_of, moved, net, ours, same_on_all_ranks, train, weights

import fusedopt


@pytest.mark.ranks(2)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_equals_step_under_fully_shard(backend):
    model, reference = sharded(build_for(backend)), sharded(build_for(backend))
    optimizer = ours(model, max_grad_norm=None, backend=backend)
    fusedopt.enable_gradient_release(model, optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # step() finds no gradient, and that is as it should be
        for number in range(3):
            loss_of(model, number).backward()
            assert all(p.grad is None for p in model.parameters())
            optimizer.step()
    train(reference, ours(reference, max_grad_norm=None), steps=3)
    close(weights(model), weights(reference))
    assert moved(model)
    same_on_all_ranks(weights(model))


@pytest.mark.ranks(2)
def test_refused_under_ddp():
    model = DistributedDataParallel(net())
    with pytest.raises(RuntimeError, match="gradient release with DistributedDataParallel"):
        fusedopt.enable_gradient_release(model, ours(model, max_grad_norm=None))
