"""Adaptive gradient clipping where ranks hold parts of the parameters: by rows it is right, else refused."""

import functools

import pytest
import torch
import torch.distributed as dist
from sharding import sharded
from thinning import every_value
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from training import close, full, loss_of, moved, net, part, weights

import fusedopt


class Rows(nn.Module):
    """Matrices alone; over two ranks their rows are shared out unevenly."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(7, 33, bias=False)
        self.last = nn.Linear(33, 5, bias=False)

    def forward(self, x):
        return self.last(torch.tanh(self.first(x)))


@every_value
@pytest.mark.ranks(2)
@pytest.mark.parametrize("cautious", [False, True])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_rows(backend, cautious):
    """Also where means over whole parameters are taken of what is left of the gradients: in the kernels, which do both
    at once."""
    model, reference = fully_shard(net(Rows)), net(Rows)
    settings = {"lr": 0.5, "adaptive_grad_clip": 0.01, "max_grad_norm": 10.0, "cautious": cautious}
    settings |= {"momentum": 0.9, "weight_decay": 0.01, "track": "total"}
    made = fusedopt.SGD(model.parameters(), **settings, backend=backend)
    alone = fusedopt.SGD(reference.parameters(), **settings, backend="torch")
    for number in range(2):
        for optimizer, trained, split in ((made, model, None), (alone, reference, lambda x: x)):
            optimizer.zero_grad()
            (loss_of(trained, number) if split is None else loss_of(trained, number, split)).backward()
            optimizer.step()
    close(weights(model), weights(reference))
    for found, norm in zip(made.metrics, alone.metrics):
        torch.testing.assert_close(found, norm, rtol=1e-5, atol=0)
    assert moved(model)


@pytest.mark.ranks(4)
def test_rows_that_fully_shard_and_tensor_parallelism_divide():
    """Together they number the rows of a rank in another order (_StridedShard)."""
    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    models = [net(Rows) for _ in range(2)]
    parallelize_module(models[0].first, grid["tp"], ColwiseParallel(output_layouts=Replicate()))
    fully_shard(models[0], mesh=grid["dp"])
    for number in range(2):
        for model, split in (
            (models[0], functools.partial(part, group=grid.get_group("dp"))),
            (models[1], lambda x: x),
        ):
            made = fusedopt.SGD([model.first.weight], lr=0.5, adaptive_grad_clip=0.01)
            model.zero_grad()
            loss_of(model, number, split).backward()
            made.step()
    close(*map(weights, models))
    assert not torch.equal(full(models[0].first.weight), net(Rows).first.weight)


@pytest.mark.ranks(2)
def test_parts_of_units_are_refused():
    """Before anything is changed, on every rank."""
    model = sharded()
    made = fusedopt.SGD(model.parameters(), lr=0.5, adaptive_grad_clip=0.01)
    loss_of(model, 0).backward()
    before = [p._local_tensor.clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match=r"holds only a part of parameter .*: parameters of two dimensions"):
        made.step()
    assert all(torch.equal(a, p._local_tensor) for a, p in zip(before, model.parameters()))
    dist.barrier()
