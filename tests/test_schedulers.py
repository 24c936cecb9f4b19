"""Every scheduler of torch, over ours and over torch's optimizer: equal histories, equal parameters, one plan."""

import inspect
import warnings

import pytest
import torch
from cases import KERNEL_NAMES, every_optimizer, model
from options import LR, NAMES, STATEFUL, TENSOR_LR
from oracles import oracle_class
from pairs import Pair, close
from thinning import every_pair_but
from torch.optim import lr_scheduler
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn

import fusedopt

STEPS = 9
"""From step 4 on, that many in which the same parameters have gradients; one less than schedulers are told of."""


def cycles(optimizer):
    """Whether there is a momentum for the scheduler to write."""
    return "betas" in optimizer.defaults or "momentum" in optimizer.defaults


SCHEDULERS = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, [lambda epoch: 0.9**epoch, lambda epoch: 1 / (1 + epoch)]),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda epoch: 0.8),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 3, gamma=0.3),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 5], gamma=0.3),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.5, 4),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.1, total_iters=6),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.8),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 7, power=2.0),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 6, eta_min=1e-3),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3, 2),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(
        o, 0.01, 0.1, step_size_up=3, mode="triangular2", cycle_momentum=cycles(o)
    ),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=STEPS, cycle_momentum=cycles(o)),
    "OneCycleLR, linear, three phases": lambda o: lr_scheduler.OneCycleLR(
        o, [0.1, 0.2], total_steps=STEPS, anneal_strategy="linear", three_phase=True, cycle_momentum=cycles(o)
    ),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1, factor=0.3, cooldown=1),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=3), lr_scheduler.CosineAnnealingLR(o, 6)], [4]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.5, 4), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "SWALR": lambda o: SWALR(o, 0.002, anneal_epochs=4),
}


def test_no_scheduler_is_missing():
    found = [cls for cls in vars(lr_scheduler).values() if inspect.isclass(cls)]
    names = {c.__name__ for c in found if issubclass(c, lr_scheduler.LRScheduler)} - {"LRScheduler", "_LRScheduler"}
    assert len(names) >= 14
    assert names <= SCHEDULERS.keys()


def step_all(schedulers):
    for each in schedulers:
        if isinstance(each, lr_scheduler.ReduceLROnPlateau):
            each.step(1.0)
        else:
            each.step()


def numbers_of(optimizer):
    """What schedulers may write."""
    keys = ("lr", "momentum", "betas")
    return [[as_number(group[key]) for key in keys if key in group] for group in optimizer.param_groups]


def as_number(value):
    return tuple(map(as_number, value)) if isinstance(value, tuple) else float(value)


@every_pair_but("name")
@pytest.mark.parametrize(
    ("name", "backend", "scheduler", "tensor"),
    [(name, "torch", scheduler, tensor) for name in NAMES for scheduler in SCHEDULERS for tensor in (False, True)]
    # Kernels get rows of numbers, whoever wrote them.
    + [(name, "triton", scheduler, False) for name in KERNEL_NAMES for scheduler in ("OneCycleLR", "SWALR")],
    indirect=["backend"],
)
def test_like_torchs_optimizer(name, scheduler, tensor, backend, device):
    """No plan is made anew, and no kernel for other numbers."""
    pair = Pair(name, None, "tiny", device=device, backend=backend)
    if tensor:
        # An object for each group of each optimizer: schedulers write to them.
        for optimizer in (pair.opt, pair.oracle):
            for group in optimizer.param_groups:
                group["lr"] = TENSOR_LR * (float(group["lr"]) / float(TENSOR_LR))
    objects = [group["lr"] for group in pair.opt.param_groups]
    schedulers = [SCHEDULERS[scheduler](optimizer) for optimizer in (pair.opt, pair.oracle)]
    histories = [], []
    with warnings.catch_warnings():
        # "lr_scheduler.step() before optimizer.step()", for one; but SequentialLR warns of a call that is its own.
        warnings.filterwarnings("error", message=".*optimizer.step.*")
        for number in range(STEPS - 1):
            pair.step()
            if number == 0:
                executors = pair.opt._engine.executors
            step_all(schedulers)
            for history, optimizer in zip(histories, (pair.opt, pair.oracle)):
                history.append(numbers_of(optimizer))
    assert histories[0] == histories[1]
    assert len({str(numbers) for numbers in histories[0]}) > 1
    assert list(map(as_number, schedulers[0].get_last_lr())) == list(map(as_number, schedulers[1].get_last_lr()))
    assert pair.opt._engine.executors is executors
    assert all(len(executor.rows.chains) == 1 for executor in executors if backend == "triton")
    if tensor:
        assert all(group["lr"] is lr for group, lr in zip(pair.opt.param_groups, objects))
    pair.check()


@every_optimizer
def test_scheduler_and_optimizer_saved_together(name):
    """Loaded into fresh ones in mid-training, they go on as if nothing had been."""

    def build(cls, params):
        optimizer = cls([{"params": params[:2]}, {"params": params[2:], "lr": 0.01}], lr=LR, **STATEFUL[name])
        return optimizer, SCHEDULERS["OneCycleLR"](optimizer)

    results = []
    for cls, split in ((fusedopt.registry[name], 4), (oracle_class(name), STEPS)):
        params = model("tiny")
        optimizer, scheduler = build(cls, params)
        for number in range(STEPS - 1):
            if number == split:
                saved = optimizer.state_dict(), scheduler.state_dict()
                optimizer, scheduler = build(cls, params)
                scheduler.load_state_dict(saved[1])
                optimizer.load_state_dict(saved[0])
            for k, p in enumerate(params):
                p.grad = torch.full_like(p, 0.5 + (number + k) % 3)
            optimizer.step()
            scheduler.step()
        results.append((params, numbers_of(optimizer)))
    assert results[0][1] == results[1][1]
    close(results[0][0], results[1][0], 1e-12)


@every_optimizer
def test_stochastic_weight_averaging(name):
    """AveragedModel reads the parameters after each step, SWALR takes over the lr, also where they are flattened."""
    results = []
    for cls, settings in ((fusedopt.registry[name], {"flatten": True}), (oracle_class(name), {})):
        torch.manual_seed(0)
        module = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 1)).double()
        averaged = AveragedModel(module)
        moving = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(0.9))
        optimizer = cls(module.parameters(), lr=0.05, **settings)
        scheduler, swa = lr_scheduler.CosineAnnealingLR(optimizer, 6), SWALR(optimizer, 0.01, anneal_epochs=2)
        for number in range(8):
            optimizer.zero_grad()
            (module(torch.linspace(-1, 1, 20, dtype=torch.float64).view(4, 5)) - 1).square().mean().backward()
            optimizer.step()
            if number > 3:
                averaged.update_parameters(module)
                swa.step()
            else:
                scheduler.step()
            moving.update_parameters(module)
        results.append([*module.parameters(), *averaged.parameters(), *moving.parameters()])
    close(*results, 1e-12)


def test_swa_of_kept_parameters():
    """What an AveragedModel copied stays, whatever later steps do to the buffer that a parameter lives in."""
    params = model("tiny")
    optimizer = fusedopt.SGD(params, lr=0.1, flatten=True)
    module = torch.nn.ParameterList(params)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    averaged = AveragedModel(module)
    averaged.update_parameters(module)
    before = [p.detach().clone() for p in averaged.parameters()]
    optimizer.step()
    assert all(map(torch.equal, before, averaged.parameters()))
    assert not all(map(torch.equal, before, params))
