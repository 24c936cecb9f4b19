"""Learning-rate schedules: L1 to L9 by formula, torch's schedulers on our optimizers, and those of ours."""

import inspect
import math
from copy import deepcopy

import pytest
import torch
from options import NAMES
from oracles import oracle_class
from thinning import every_value
from torch.optim import lr_scheduler

import fusedopt
from fusedopt.schedules import CosineRestarts, ExponentialWarmup

STEPS = 200
ETA = 0.1


def plateau(optimizer):
    return lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=4, cooldown=3, min_lr=1e-4)


def loss(t):
    """Falls, and then stays where it is for longer and longer."""
    return 1 / (1 + (t // 7) ** 0.5) if t < 60 else 0.2


def cyclic(mode, optimizer):
    return lr_scheduler.CyclicLR(
        optimizer, 0.01, ETA, step_size_up=15, step_size_down=25, mode=mode, gamma=0.99, cycle_momentum=False
    )


def cyclic_formula(scale, t):
    cycle, place = divmod(t, 40)
    rising = place / 15 if place <= 15 else 1 - (place - 15) / 25
    return 0.01 + (ETA - 0.01) * rising * scale(cycle, t)


def restarts_formula(t):
    period, peak = 20.0, ETA
    while t >= period:
        t, period, peak = t - period, 1.5 * period, 0.8 * peak
    return 0.01 + (max(peak, 0.01) - 0.01) / 2 * (1 + math.cos(math.pi * t / period))


def onecycle_formula(t):
    low, lowest, top, end = ETA / 25, ETA / 25 / 1e4, 0.3 * STEPS - 1, STEPS - 1
    return low + (ETA - low) * t / top if t <= top else ETA + (lowest - ETA) * (t - top) / (end - top)


def warmup_then_cosine(optimizer):
    warm = ExponentialWarmup(optimizer, 20)
    return lr_scheduler.SequentialLR(optimizer, [warm, lr_scheduler.CosineAnnealingLR(optimizer, 180)], [20])


ROWS = {
    "L1 constant": (lambda o: None, lambda t: ETA),
    "L2 exponential": (lambda o: lr_scheduler.ExponentialLR(o, 0.95), lambda t: ETA * 0.95**t),
    "L2 exponential, by e": (
        lambda o: lr_scheduler.LambdaLR(o, lambda t: math.exp(-0.05 * t)), lambda t: ETA * math.exp(-0.05 * t),
    ),
    "L3 step decay": (lambda o: lr_scheduler.StepLR(o, 30, 0.5), lambda t: ETA * 0.5 ** (t // 30)),
    "L4 cosine annealing": (
        lambda o: lr_scheduler.CosineAnnealingLR(o, STEPS, eta_min=0.001),
        lambda t: 0.001 + (ETA - 0.001) / 2 * (1 + math.cos(math.pi * t / STEPS)),
    ),
    "L5 cosine with restarts": (lambda o: CosineRestarts(o, 20, eta_min=0.01), restarts_formula),
    "L6 reduce on plateau": (plateau, None),
    "L7 cyclic": (lambda o: cyclic("triangular", o), lambda t: cyclic_formula(lambda cycle, t: 1, t)),
    "L7 cyclic, halved": (lambda o: cyclic("triangular2", o), lambda t: cyclic_formula(lambda c, t: 0.5**c, t)),
    "L7 cyclic, falling": (lambda o: cyclic("exp_range", o), lambda t: cyclic_formula(lambda c, t: 0.99**t, t)),
    "L8 one-cycle": (
        lambda o: lr_scheduler.OneCycleLR(o, ETA, STEPS, anneal_strategy="linear", cycle_momentum=False),
        onecycle_formula,
    ),
    "L9 exponential warm-up": (
        lambda o: ExponentialWarmup(o, 50), lambda t: ETA * 1e-3 ** (1 - min(t, 50) / 50),
    ),
    "L9 and then L4": (
        warmup_then_cosine,
        lambda t: ETA * 1e-3 ** (1 - t / 20) if t < 20 else ETA / 2 * (1 + math.cos(math.pi * (t - 20) / 180)),
    ),
    "L9 times L5": (
        lambda o: lr_scheduler.ChainedScheduler([ExponentialWarmup(o, 50), CosineRestarts(o, 20, eta_min=0.01)]),
        lambda t: 1e-3 ** (1 - min(t, 50) / 50) * restarts_formula(t),
    ),
}  # fmt: skip

OTHERS = {
    "multiplicative": lambda o: lr_scheduler.MultiplicativeLR(o, lambda t: 0.9),
    "multi-step": lambda o: lr_scheduler.MultiStepLR(o, [30, 80], 0.1),
    "constant factor": lambda o: lr_scheduler.ConstantLR(o, 0.5, 10),
    "linear": lambda o: lr_scheduler.LinearLR(o, total_iters=20),
    "polynomial": lambda o: lr_scheduler.PolynomialLR(o, 100, 2.0),
    "warm restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 10, 2),
}
EVERY = {name: make for name, (make, _) in ROWS.items()} | OTHERS


def drive(optimizer, scheduler, steps=STEPS):
    """The learning rates of so many steps, with the same gradients at each call."""
    rates = []
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for t in range(steps):
        for k, p in enumerate(params):
            p.grad = torch.full_like(p, math.sin(1 + t + k))
        optimizer.step()
        rates.append([float(group["lr"]) for group in optimizer.param_groups])
        if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
            scheduler.step(loss(t))
        elif scheduler is not None:
            scheduler.step()
    return rates


def parameters():
    return [torch.nn.Parameter(torch.ones(2, dtype=torch.float64)) for _ in range(2)]


def as_given(lr, kind):
    return torch.tensor(lr, dtype=torch.float64) if kind == "tensor" else lr


def test_every_scheduler_of_torch_is_here():
    found = {type(make(fusedopt.SGD(parameters(), lr=ETA))) for make in EVERY.values()} - {type(None)}
    classes = {
        c for _, c in inspect.getmembers(lr_scheduler, inspect.isclass) if issubclass(c, lr_scheduler.LRScheduler)
    }
    abstract = {lr_scheduler.LRScheduler, lr_scheduler._LRScheduler}
    assert {c for c in classes - abstract if c.__module__ == lr_scheduler.__name__} <= found
    assert found >= {CosineRestarts, ExponentialWarmup}


@pytest.mark.parametrize("kind", ["float", "tensor"])
@pytest.mark.parametrize("row", ROWS)
def test_formula(row, kind):
    make, formula = ROWS[row]
    params = parameters()
    optimizer = fusedopt.SGD(params, lr=as_given(ETA, kind))
    given = optimizer.param_groups[0]["lr"]
    rates = [rate for (rate,) in drive(optimizer, make(optimizer))]
    if formula is not None:
        # 200 multiplications of 1.1e-16 each; above that a wrong digit shows.
        assert rates == pytest.approx([formula(t) for t in range(STEPS)], rel=1e-13, abs=1e-17)
    else:
        assert rates[0] == ETA and rates[-1] == 1e-4 and len(set(rates)) > 5
    if kind == "tensor":
        assert optimizer.param_groups[0]["lr"] is given
    moved = sum(rate * math.sin(1 + t) for t, rate in enumerate(rates))
    assert float(params[0][0].detach()) == pytest.approx(1 - moved, abs=1e-12)


@every_value
@pytest.mark.parametrize("kind", ["float", "tensor"])
@pytest.mark.parametrize("name", NAMES)
def test_every_schedule_on_every_optimizer(name, kind):
    """To the last digit the learning rates that torch's optimizer gets, the same steps by them, one plan for all."""
    for make in EVERY.values():
        steps = 30
        ours, theirs = parameters(), parameters()
        optimizer = fusedopt.registry[name]([{"params": [p]} for p in ours], lr=as_given(ETA, kind))
        optimizer.step()
        scheduler = make(optimizer)
        rates = drive(optimizer, scheduler, 1)
        plan = optimizer._engine.plan
        rates += drive(optimizer, scheduler, steps - 1)
        assert optimizer._engine.plan is plan
        oracle = oracle_class(name)([{"params": [p]} for p in theirs], lr=as_given(ETA, kind), foreach=False)
        other = make(oracle)
        assert rates == drive(oracle, other, 1) + drive(oracle, other, steps - 1)
        for p, q in zip(ours, theirs):
            # 30 steps of a dozen operations in float64; torch's Adam takes the step size from a tensor in its dtype.
            torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)
        if scheduler is not None:
            scheduler.load_state_dict(deepcopy(scheduler.state_dict()))


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float64])
@pytest.mark.parametrize(("period", "growth"), [(1, 1), (7, 1), (5, 2), (1, 3)])
def test_restarts_equal_torchs(period, growth, dtype):
    """Where the growth is whole and nothing decays, to the last digit."""
    rates = []
    for make in (
        lambda o: CosineRestarts(o, period, growth, 1, eta_min=0.003),
        lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, period, growth, eta_min=0.003),
    ):
        lrs = (ETA, 0.05) if dtype is None else (torch.tensor(ETA, dtype=dtype), torch.tensor(0.05, dtype=dtype))
        optimizer = fusedopt.SGD([{"params": [p], "lr": lr} for p, lr in zip(parameters(), lrs)])
        rates.append(drive(optimizer, make(optimizer)))
    assert rates[0] == rates[1]


@pytest.mark.parametrize("kind", ["float", "tensor"])
@pytest.mark.parametrize("row", ["L5 cosine with restarts", "L9 exponential warm-up", "L9 and then L4", "L9 times L5"])
@pytest.mark.parametrize("after", [3, 20, 47])
def test_saved_and_resumed(row, after, kind):
    """A new optimizer and scheduler go on from a checkpoint as if nothing had been."""
    make, _ = ROWS[row]
    optimizer = fusedopt.Adam(parameters(), lr=as_given(ETA, kind))
    scheduler = make(optimizer)
    drive(optimizer, scheduler, after)
    saved = deepcopy((optimizer.state_dict(), scheduler.state_dict()))
    expected = drive(optimizer, scheduler, 40)
    resumed = fusedopt.Adam(parameters(), lr=as_given(0.7, kind))
    again = make(resumed)
    resumed.load_state_dict(saved[0])
    again.load_state_dict(saved[1])
    assert drive(resumed, again, 40) == expected
    if not hasattr(scheduler, "_schedulers"):
        resumed = fusedopt.Adam(parameters(), lr=as_given(0.7, kind))
        resumed.load_state_dict(saved[0])
        again = type(scheduler)(resumed, **arguments(scheduler), last_epoch=after - 1)
        # Told of one step before: the checkpoint's learning rate is kept.
        assert float(resumed.param_groups[0]["lr"]) == expected[0][0]
        assert drive(resumed, again, 40) == expected


def arguments(scheduler):
    names = [name for name in inspect.signature(type(scheduler)).parameters if name not in ("optimizer", "last_epoch")]
    return {name: getattr(scheduler, name) for name in names}


def test_a_long_run_is_no_slower():
    optimizer = fusedopt.SGD(parameters(), lr=ETA)
    schedule = CosineRestarts(optimizer, 1, 1, 1)
    assert schedule.cycle(10**12) == (10**12, 0, 1)
    assert CosineRestarts(optimizer, 1, 1.5).cycle(10**12)[0] < 100


def test_the_floor_holds():
    """Peaks that fell below eta_min stay there, and learning rates of 0 stay 0."""
    optimizer = fusedopt.SGD(parameters(), lr=ETA)
    rates = drive(optimizer, CosineRestarts(optimizer, 3, 1, 0.5, eta_min=0.02))
    assert min(rates) == [0.02] == rates[-1]
    optimizer = fusedopt.SGD(parameters(), lr=0.0)
    chained = [ExponentialWarmup(optimizer, 5), CosineRestarts(optimizer, 3)]
    assert drive(optimizer, lr_scheduler.ChainedScheduler(chained), 20) == [[0.0]] * 20


BAD = [
    (CosineRestarts, {"period": 0}, ValueError, "period: 0; give a number that is finite and at least 1"),
    (CosineRestarts, {"period": 0.5}, ValueError, "period"),
    (CosineRestarts, {"period": math.inf}, ValueError, "period"),
    (CosineRestarts, {"period": "10"}, TypeError, "period must be a number, got '10'"),
    (CosineRestarts, {"period": 10, "period_growth": 0.99}, ValueError, "period_growth"),
    (CosineRestarts, {"period": 10, "period_growth": math.nan}, ValueError, "period_growth"),
    (CosineRestarts, {"period": 10, "peak_decay": 0}, ValueError, "peak_decay: 0; .* above 0 and at most 1"),
    (CosineRestarts, {"period": 10, "peak_decay": 1.01}, ValueError, "peak_decay"),
    (CosineRestarts, {"period": 10, "eta_min": -0.1}, ValueError, "eta_min"),
    (ExponentialWarmup, {"steps": 0}, ValueError, "steps"),
    (ExponentialWarmup, {"steps": True}, TypeError, "steps"),
    (ExponentialWarmup, {"steps": 5, "start_factor": 0}, ValueError, "start_factor"),
    (ExponentialWarmup, {"steps": 5, "start_factor": 2}, ValueError, "start_factor"),
]


@pytest.mark.parametrize(("schedule", "options", "error", "message"), BAD)
def test_bad_input(schedule, options, error, message):
    optimizer = fusedopt.SGD(parameters(), lr=ETA)
    with pytest.raises(error, match=message):
        schedule(optimizer, **options)
    assert optimizer.param_groups[0]["lr"] == ETA and "initial_lr" not in optimizer.param_groups[0]
    with pytest.raises(TypeError, match="not an Optimizer"):
        schedule(parameters(), 10)
