"""Other parameters with gradients at every step, and on every rank others, as in mixtures of experts."""

import pytest
import torch
import torch.distributed as dist
from sharding import counted
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor
from training import MAX_NORM, close, full, net, same_on_all_ranks, weights

import fusedopt
from fusedopt import plan


class Experts(nn.Module):
    """Uneven shards, and one that is empty on the second rank."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(3, 5, bias=False) for _ in range(2))
        self.gain = nn.Parameter(torch.full((1,), 3.0))


def give(params, number):
    generator = torch.Generator().manual_seed(number)
    for k, p in enumerate(params):
        whole = torch.randn(p.shape, generator=generator)
        here = number == 0 or (k + number + dist.get_rank()) % 3
        p.grad = distribute_tensor(whole, p.device_mesh, p.placements)
        if not here:
            p.grad = None


CLIP, MEANS = {"max_grad_norm": MAX_NORM}, {"cautious": True, "track": "total"}


@pytest.mark.ranks(2)
@pytest.mark.parametrize(
    ("settings", "backend"), [(CLIP, "torch"), (MEANS, "torch"), (CLIP | MEANS, "triton")], ids=str
)
def test_sets_that_are_put_together_equal_whole_plans(settings, backend):
    """One optimizer plans once; the other one anew at every step."""
    plans, survey = [], plan.survey
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "survey", lambda *args: plans.append(args[0]) or survey(*args))
        models = [fully_shard(net(Experts)) for _ in range(2)]
        pair = [fusedopt.AdamW(model.parameters(), lr=0.1, backend=backend, **settings) for model in models]
        with counted(pair[0]) as calls:
            for number in range(5):
                for model in models:
                    give(list(model.parameters()), number)
                pair[1]._engine.forget()
                for optimizer in pair:
                    optimizer.step()
                close(weights(models[0]), weights(models[1]))
    assert plans.count(pair[0]) == 1 and plans.count(pair[1]) == 5
    assert len(calls) == 5 * len(settings)
    for p, q in zip(models[0].parameters(), models[1].parameters()):
        states = [[full(x) for x in optimizer.state[key].values()] for optimizer, key in zip(pair, (p, q))]
        close(*states, 1e-6, "states")
    if "track" in settings:
        close(pair[0].metrics, pair[1].metrics, 1e-6, "metrics")
        same_on_all_ranks(pair[0].metrics)
