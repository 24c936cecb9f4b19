"""``capturable=True`` and CUDA graphs where ranks hold parts of the parameters. Graphs: see tests/graphs.py."""

import pytest
import torch
import torch.distributed as dist
from graphs import Waits, capture
from sharding import counted
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor
from training import MAX_NORM, Small, close, full, loss_of, moved, net, same_on_all_ranks, weights

import fusedopt

OPTIONS = {"SGD": {"momentum": 0.9, "dampening": 0.1}}

SETTINGS = [
    {"max_grad_norm": MAX_NORM, "ema_decay": 0.9},
    {"skip_nonfinite": True, "track": "parameters"},
    {"max_grad_norm": MAX_NORM, "track": "total", "cautious": True},
]
"""For which ranks communicate."""


def sharded():
    return fully_shard(net(Small))


class Run:
    """A sharded model, a learning rate that is a tensor, and gradients that stay where they are."""

    def __init__(self, name, **settings):
        self.model = sharded()
        self.params = list(self.model.parameters())
        self.rate = torch.tensor(0.03, dtype=torch.float64)
        options = {"lr": self.rate, **OPTIONS.get(name, {}), "capturable": True, **settings}
        self.optimizer = fusedopt.registry[name](self.params, backend="triton", **options)
        self.grads = [torch.zeros_like(p) for p in self.params]
        for p, g in zip(self.params, self.grads):
            p.grad = g

    def prepare(self, number, broken=False):
        """The gradients and the learning rate of a step; one rank's may be broken."""
        generator = torch.Generator().manual_seed(number)
        for p, g in zip(self.params, self.grads):
            whole = torch.randn(p.shape, generator=generator)
            g._local_tensor.copy_(distribute_tensor(whole, p.device_mesh, p.placements)._local_tensor)
        if broken and dist.get_rank() == 1:
            self.model.first.weight.grad._local_tensor.fill_(float("nan"))
        self.rate.fill_(0.1 / (1 + number))

    def seen(self):
        optimizer = self.optimizer
        states = [full(x) for state in optimizer.state.values() for x in state.values()]
        averages = [] if optimizer.ema_decay is None else list(map(full, optimizer.ema_parameters()))
        metrics = [] if optimizer.track is None else list(optimizer.metrics)
        norm = [] if optimizer.grad_norm is None else [optimizer.grad_norm]
        return [*weights(self.model), *states, *averages, *metrics, *norm, optimizer.skipped_steps]


def train_like(optimizer, model, steps):
    for number in range(steps):
        optimizer.zero_grad()
        loss_of(model, number).backward()
        if number == 2 and dist.get_rank() == 1:
            model.first.weight.grad._local_tensor.fill_(float("nan"))
        optimizer.step()


@pytest.mark.ranks(2)
@pytest.mark.parametrize("name", ["SGD", "AdamW", "ASGD"])
def test_the_device_counts_as_the_host_does(name):
    """With a NaN on one rank, which skips a step on both. Tolerance: hyperparameters made by another library's powers
    in float64, rounded to float32."""
    settings = {"max_grad_norm": MAX_NORM, "skip_nonfinite": True, "track": "parameters", "backend": "triton"}
    options = {"lr": 1e-2, **OPTIONS.get(name, {}), **settings}
    models = [sharded() for _ in range(2)]
    optimizers = [
        fusedopt.registry[name](model.parameters(), **options, **({"capturable": True} if capturable else {}))
        for model, capturable in zip(models, (True, False))
    ]
    with counted(optimizers[0]) as calls:
        train_like(optimizers[0], models[0], 4)
    train_like(optimizers[1], models[1], 4)
    assert calls == [2, 3 * len(list(models[0].parameters()))] * 4
    close(weights(models[0]), weights(models[1]))
    assert moved(models[0])
    for optimizer in optimizers:
        assert optimizer.skipped_steps == 1
    for found, expected in zip(optimizers[0].metrics, optimizers[1].metrics):
        close([found], [expected], 1e-5, "metrics")
    same_on_all_ranks([*weights(models[0]), *optimizers[0].metrics])
    for p, q in zip(models[0].parameters(), models[1].parameters()):
        ours, others = optimizers[0].state[p], optimizers[1].state[q]
        assert ours.keys() == others.keys()
        if "step" in ours:
            assert type(ours["step"]) is torch.Tensor and ours["step"] == others["step"] == 3


@pytest.mark.ranks(2)
def test_nobody_waits():
    """Not for norms, nor for means over whole parameters, nor for a rank that skips."""
    run = Run("AdamW", **SETTINGS[2], skip_nonfinite=True)
    run.prepare(0)
    run.optimizer.step()
    for number in range(1, 4):
        run.prepare(number, broken=number == 2)
        with Waits():
            run.optimizer.step()


def identical(a, b):
    """Norms of broken gradients are NaN."""
    return a.dtype == b.dtype and torch.equal(a.nan_to_num(nan=-1.0), b.nan_to_num(nan=-1.0))


@pytest.mark.ranks(2)
@pytest.mark.parametrize(("name", "settings"), list(zip(["NAdam", "AdamW", "AdamW"], SETTINGS)), ids=str)
def test_a_replay_is_an_eager_step(name, settings):
    """To the last bit, norms over all ranks included; also where eager steps come between."""
    eager, captured = Run(name, **settings), Run(name, **settings)
    for run in (eager, captured):
        run.prepare(0)
        run.optimizer.step()
        run.prepare(1)
    before = captured.seen()
    with pytest.MonkeyPatch.context() as patch, capture(patch, captured.optimizer._engine.executors) as graph:
        captured.optimizer.step()
    assert all(map(torch.equal, before[: len(eager.params)], captured.seen()))  # nothing was done yet
    for number in range(1, 5):
        for run in (eager, captured):
            run.prepare(number, broken="skip_nonfinite" in settings and number == 2)
        eager.optimizer.step()
        if number == 3:
            captured.optimizer.step()
        else:
            graph.replay()
        found, expected = captured.seen(), eager.seen()
        assert len(found) == len(expected)
        assert all(map(identical, found, expected)), number
    assert not torch.equal(found[0], before[0])
    same_on_all_ranks(found)


@pytest.mark.ranks(2)
@pytest.mark.parametrize("capturable", [True, False])
def test_checkpoints_go_between_both_kinds(capturable):
    """Through torch.distributed.checkpoint's state dicts, as training would resume."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    ended = []
    for resumed in (False, True):
        model = sharded()
        run = {"lr": 1e-2, "max_grad_norm": MAX_NORM, "backend": "triton"}
        optimizer = fusedopt.AdamW(model.parameters(), **run, capturable=capturable)
        for number in range(3):
            if resumed and number == 2:
                state = get_optimizer_state_dict(model, optimizer)
                optimizer = fusedopt.AdamW(model.parameters(), **run, capturable=not capturable)
                set_optimizer_state_dict(model, optimizer, state)
            optimizer.zero_grad()
            loss_of(model, number).backward()
            optimizer.step()
        ended.append(weights(model))
    close(*ended)
    assert any(not torch.equal(a, b.detach()) for a, b in zip(ended[0], net(Small).parameters()))
