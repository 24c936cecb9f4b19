"""ZeroRedundancyOptimizer: every rank's optimizer has some of the parameters, with whole gradients."""

import copy

import pytest
import torch
import torch.distributed as dist
from thinning import every_pair
from torch.nn.parallel import DistributedDataParallel
from training import MAX_NORM, clip, close, moved, net, same_on_all_ranks, train, weights

import fusedopt

STEPS = 4
OPTIONS = {"lr": 1e-2, "weight_decay": 0.1, "eps": 1e-4}
FUSED = {"max_grad_norm": MAX_NORM, "clip_group": "world"}


def wrapped():
    return DistributedDataParallel(net())


def zero(model, cls, view=False, **settings):
    # Its import compiles TorchScript, with warnings.
    from torch.distributed.optim import ZeroRedundancyOptimizer

    return ZeroRedundancyOptimizer(
        model.parameters(), optimizer_class=cls, parameters_as_bucket_view=view, **OPTIONS, **settings
    )


def expected(steps=STEPS):
    model = wrapped()
    train(model, torch.optim.AdamW(model.parameters(), **OPTIONS), steps, before_step=clip)
    return weights(model)


@every_pair
@pytest.mark.ranks(2)
@pytest.mark.parametrize("flatten", [False, True], ids=["in_place", "flatten"])
@pytest.mark.parametrize("view", [False, True], ids=["own", "bucket_view"])
@pytest.mark.parametrize("where", ["outside", "inside"])
def test_trains_as_torch_does(where, view, flatten):
    model = wrapped()
    optimizer = zero(model, fusedopt.AdamW, view, flatten=flatten, **(FUSED if where == "inside" else {}))
    train(model, optimizer, STEPS, before_step=clip if where == "outside" else None)
    close(weights(model), expected())
    same_on_all_ranks(weights(model))
    assert moved(model.module)


@pytest.mark.ranks(2)
@pytest.mark.parametrize("source", ["ours", "torch"])
@pytest.mark.parametrize("target", ["ours", "torch"])
def test_consolidated_state_goes_both_ways(source, target):
    """Saved from one, loaded into the other: as if training had not been interrupted."""
    model = wrapped()

    def build(kind):
        return zero(model, fusedopt.AdamW, **FUSED) if kind == "ours" else zero(model, torch.optim.AdamW)

    optimizer = build(source)
    train(model, optimizer, 2, before_step=clip if source == "torch" else None)
    optimizer.consolidate_state_dict(to=0)
    states = [optimizer.state_dict() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(states)
    optimizer = build(target)
    optimizer.load_state_dict(copy.deepcopy(states[0]))
    train(model, optimizer, 2, start=2, before_step=clip if target == "torch" else None)
    close(weights(model), expected())
    same_on_all_ranks(weights(model))


@pytest.mark.ranks(2)
def test_nonfinite_gradient_of_one_ranks_parameters_skips_on_all():
    model = wrapped()
    optimizer = zero(model, fusedopt.AdamW, skip_nonfinite=True, **FUSED)
    train(model, optimizer, 2)
    before = [w.clone() for w in weights(model)]

    def spoil(model):  # one that only one of the ranks updates
        model.module.first.weight.grad[0, 0] = float("nan")

    train(model, optimizer, 1, start=2, before_step=spoil)
    assert all(map(torch.equal, before, weights(model)))
    assert optimizer.optim.skipped_steps == 1
