"""What goes wrong on many ranks: nothing waits for ever, and nothing goes on as if nothing had happened.

A NaN on one rank, a rank without gradients and an optimizer built too early are in test_fsdp2_faults.py, a rank that is
killed in test_demo_distributed.py.
"""

import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from sharding import sharded
from test_checkpoint import save, trained
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor
from training import full, loss_of, ours, train, weights

import fusedopt

SOON = timedelta(seconds=4)
"""Within which ranks on busy cores still meet to make the group."""


@pytest.mark.ranks(2)
def test_a_rank_that_does_not_step_is_not_waited_for_for_ever():
    """The norm's all_reduce has the time limit of its process group, and nothing was updated when it is over."""
    group = dist.new_group(timeout=SOON)
    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    optimizer = fusedopt.AdamW([p], max_grad_norm=1.0, clip_group=group)
    if dist.get_rank() == 0:
        begin = time.monotonic()
        with pytest.raises(RuntimeError, match=r"[Tt]imed out"):
            optimizer.step()
        assert time.monotonic() - begin < 60
        assert torch.equal(p.detach(), torch.ones(3))
        assert optimizer.state[p]["step"] == 0


@pytest.mark.ranks(2)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_nor_where_means_over_whole_parameters_are_taken(backend):
    group = dist.new_group(timeout=SOON)
    # A name of its own: torch's caches take meshes of equal ranks and names for each other, whatever their groups.
    mesh = DeviceMesh.from_group(group, "cpu", mesh_dim_names=(f"soon over, {backend}",))
    whole = distribute_tensor(torch.ones(4), mesh, [Shard(0)])
    p = torch.nn.Parameter(whole)
    p.grad = torch.ones_like(p)
    optimizer = fusedopt.AdamW([p], cautious=True, backend=backend)
    if dist.get_rank() == 0:
        begin = time.monotonic()
        with pytest.raises(RuntimeError, match=r"[Tt]imed out"):
            optimizer.step()
        assert time.monotonic() - begin < 60
        assert torch.equal(p._local_tensor, torch.ones(2))
        state = optimizer.state[p]
        assert state["step"] == 0 and not state["exp_avg"]._local_tensor.any()


@pytest.mark.ranks(2)
@pytest.mark.parametrize("damage", ["cut short", "a rank's file is missing", "no metadata"])
def test_a_damaged_checkpoint_is_an_error_on_every_rank(damage, folder):
    model, optimizer = trained(ours, 2, 2)
    save("sharded", 2, model, optimizer, folder)
    dist.barrier()
    if dist.get_rank() == 0:
        file = folder / "__1_0.distcp"
        if damage == "cut short":
            file.write_bytes(file.read_bytes()[:-2000])
        elif damage == "no metadata":
            (folder / ".metadata").unlink()
        else:
            file.unlink()
    dist.barrier()
    state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer)))
    with pytest.raises(CheckpointException):
        dcp.load(state, checkpoint_id=folder)


@pytest.mark.ranks(2)
def test_a_checkpoint_of_another_model_is_an_error(folder):
    model, optimizer = trained(ours, 2, 1)
    save("sharded", 2, model, optimizer, folder)
    dist.barrier()
    other = torch.nn.Linear(3, 4)
    state = {"model": other.state_dict()}
    with pytest.raises(CheckpointException):
        dcp.load(state, checkpoint_id=folder)


@pytest.mark.ranks(2)
def test_a_bad_gradient_is_named_before_anything_changes():
    """On the rank that has it; the other waits for the norm no longer than its group's time limit."""
    model = sharded()
    optimizer = ours(model, max_grad_norm=None)
    train(model, optimizer, 1)
    before = [w.clone() for w in weights(model)]
    loss_of(model, 1).backward()
    model.last.weight.grad = None
    model.last.weight.grad = torch.zeros_like(model.last.weight)
    model.last.weight.grad._local_tensor = torch.zeros(3)
    with pytest.raises(RuntimeError, match=r"the gradient of parameter 1 .* has shape"):
        optimizer.step()
    assert all(map(torch.equal, before, weights(model)))
    assert all(int(full(state["step"])) == 1 for state in optimizer.state.values())
