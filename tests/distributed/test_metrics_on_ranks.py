"""``optimizer.metrics`` where ranks hold parts of the parameters: the norms are those of the whole, on every rank."""

import pytest
import torch
import torch.distributed as dist
from sharding import counted, sharded
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from training import MAX_NORM, build_for, loss_of, net, same_on_all_ranks

import fusedopt
from fusedopt.stopping import SmallChange

OPTIONS = {"lr": 1e-2, "eps": 1e-3, "max_grad_norm": MAX_NORM}


def backward(model, number, split=None):
    (loss_of(model, number) if split is None else loss_of(model, number, split)).backward()


@pytest.mark.ranks(2)
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("track", ["total", "parameters"])
def test_shards(track, backend):
    """The step adds up, in one all_reduce more, so a single rank may ask. Between backends and ranks float32 sums are
    taken in other orders: 1e-7 of each. The bias of a layer before a normalisation has a gradient near zero."""
    model, reference = sharded(build_for(backend)), net(build_for(backend))
    made = fusedopt.AdamW(model.parameters(), **OPTIONS, track=track, backend=backend)
    alone = fusedopt.AdamW(reference.parameters(), **OPTIONS, track=track, backend="torch")
    for number in range(3):
        for optimizer, trained, split in ((made, model, None), (alone, reference, lambda x: x)):
            optimizer.zero_grad()
            backward(trained, number, split)
        with counted(made) as calls:
            made.step()
        alone.step()
        count = len(list(model.parameters()))
        assert calls == [2, 3 * count]
        expected = alone.metrics
        if dist.get_rank() == 0:
            for found, norms in zip(made.metrics, expected):
                assert found.dtype == torch.float32 and found.shape == (() if track == "total" else (count,))
                torch.testing.assert_close(found, norms, rtol=1e-4, atol=1e-6)
    same_on_all_ranks(made.metrics)


@pytest.mark.ranks(2)
def test_other_parameters_on_other_ranks():
    """As of pipeline stages: ``clip_group`` makes the total theirs, too; each rank has the norms of its own."""
    rank = dist.get_rank()
    p = torch.nn.Parameter(torch.full((3,), 1.0 + rank))
    made = fusedopt.SGD([p], lr=1.0, track="total", clip_group="world")
    if rank == 1:
        p.grad = torch.full_like(p, 2.0)
    made.step()
    total = made.metrics
    made.track = "parameters"
    own = made.metrics
    p_norm = [3**0.5, 0.0]
    torch.testing.assert_close(own.param_norm, torch.tensor([p_norm[rank]]))
    torch.testing.assert_close(own.update_norm, torch.tensor([12**0.5 * rank]))
    torch.testing.assert_close(torch.stack(total), torch.tensor([12**0.5, 12**0.5, 3**0.5]))


@pytest.mark.ranks(2)
def test_a_rank_without_gradients_takes_part():
    model = sharded()
    made = fusedopt.SGD(model.parameters(), lr=0.1, track="total")
    made.step()
    assert made.metrics.update_norm == 0
    whole = torch.cat([p.detach().flatten() for p in net().parameters()]).norm()
    torch.testing.assert_close(made.metrics.param_norm, whole, rtol=1e-6, atol=0)


@pytest.mark.ranks(4)
def test_small_change_over_several_meshes():
    """Without ``track``: every rank finds the change of the whole, and so they stop together."""
    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    layouts = [(grid, [Shard(0), Shard(1)]), (grid["dp"], [Shard(0)]), (grid["tp"], [Replicate()])]
    params = [nn.Parameter(distribute_tensor(torch.ones(3, 5), *layout)) for layout in layouts]
    optimizer = fusedopt.SGD([*params, nn.Parameter(torch.ones(3, 5))], lr=1.0)
    stop = SmallChange(optimizer, 8.0, check_every=1)
    for p in optimizer.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert stop()
    assert stop.reason == f"the parameters changed by {60**0.5:.3g} < 8"
