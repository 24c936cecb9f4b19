"""Accelerate on two ranks: it wraps the model, swaps the optimizer's parameters, clips, saves and loads."""

import os

import pytest
import torch
import torch.distributed as dist

accelerate = pytest.importorskip("accelerate")

from accelerate.state import AcceleratorState, PartialState  # noqa: E402
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin  # noqa: E402
from training import close, full, net, part, same_on_all_ranks, two_groups  # noqa: E402

import fusedopt  # noqa: E402

OPTIONS = {"lr": 1e-2, "weight_decay": 0.1, "eps": 1e-4}
MAX_NORM = 0.5


def environment():
    """What a launcher tells its processes."""
    rank, world = str(dist.get_rank()), str(dist.get_world_size())
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}


def accelerator(engine):
    environment()
    AcceleratorState._reset_state(reset_partial_state=True)
    made = accelerate.Accelerator(cpu=True)
    if engine == "FSDP2":
        # Accelerate offers it for GPUs only; what it does there needs none.
        made.state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="no_wrap")
        made.state.distributed_type = PartialState().distributed_type = DistributedType.FSDP
        assert made.is_fsdp2
    return made


def prepared(engine, cls, **settings):
    run, model = accelerator(engine), net()
    return run, *run.prepare(model, cls(two_groups(model), **OPTIONS, **settings))


def train(run, model, optimizer, steps, clip=False):
    for number in range(*steps):
        generator = torch.Generator().manual_seed(number)
        x, y = torch.randn(8, 7, generator=generator), torch.randn(8, 5, generator=generator)
        optimizer.zero_grad()
        run.backward((model(part(x)) - part(y)).square().mean())
        if clip:
            run.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()


def weights(model):
    return [full(p) for p in model.parameters()]


ENGINES = pytest.mark.parametrize("engine", ["DDP", "FSDP2"])


@pytest.mark.ranks(2)
@ENGINES
@pytest.mark.parametrize("inside", [False, True], ids=["outside", "inside"])
def test_as_torch_does(engine, inside):
    expected = prepared(engine, torch.optim.AdamW, foreach=False)
    train(*expected, (0, 5), clip=True)
    run = prepared(engine, fusedopt.AdamW, **({"max_grad_norm": MAX_NORM} if inside else {}))
    assert type(run[1]).__name__ == {"DDP": "DistributedDataParallel", "FSDP2": "FSDPNet"}[engine]
    train(*run, (0, 5), clip=not inside)
    assert run[2].optimizer.grad_norm is None or run[2].optimizer.grad_norm > MAX_NORM
    # float32, 5 steps of 1e-2.
    close(weights(run[1]), weights(expected[1]))
    assert not any(map(torch.equal, weights(run[1]), weights(net())))
    same_on_all_ranks(weights(run[1]))


@pytest.mark.ranks(2)
@pytest.mark.parametrize(("engine", "flatten"), [("DDP", False), ("DDP", True), ("FSDP2", False)])
def test_saved_and_loaded(engine, flatten, folder):
    run = prepared(engine, fusedopt.AdamW, max_grad_norm=MAX_NORM, flatten=flatten)
    train(*run, (0, 3))
    run[0].save_state(str(folder))
    train(*run, (3, 6))
    other = prepared(engine, fusedopt.AdamW, max_grad_norm=MAX_NORM, flatten=flatten)
    other[0].load_state(str(folder))
    train(*other, (3, 6))
    close(weights(run[1]), weights(other[1]), 0.0)
    steps = {int(state["step"]) for state in other[2].optimizer.state.values()}
    assert steps == {6}
