"""What torch's own optimizer tests ask for, or forget to ask: dtypes, devices, copies, profiles, memory."""

import copy
import inspect
import io
import pickle

import pytest
import torch
from cases import (
    every_choice_of_options,
    every_optimizer,
    every_optimizer_and_backend,
    every_torch_optimizer,
    give_gradients,
    model,
)
from options import IN_TORCH, LR, STATEFUL
from oracles import oracle_class
from pairs import Pair, assert_same, close, raised, snapshot
from torch.profiler import ProfilerActivity, profile

import fusedopt

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

# One rounding per step of numbers around 1, four steps: 2^-53, 2^-24, 2^-8, 2^-11; states have the same dtype, and
# Adam's direction magnifies their roundings by ten.
AFTER_FOUR_STEPS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.1, torch.float16: 1e-2}


@every_optimizer_and_backend
def test_mixed_dtypes_in_one_optimizer(name, backend, device):
    """Neighbours of other dtypes, in one group, each as exact as its dtype."""
    mixed, exact = [], []
    for column in zip(*(model("tiny", dtype, device) for dtype in DTYPES)):
        mixed += column
        exact += [torch.nn.Parameter(p.detach().double()) for p in column]
    # float16 knows no number below 6e-8.
    options = {"lr": LR, **STATEFUL[name], **({} if name == "SGD" else {"eps": 1e-4})}
    options = {key: value for key, value in options.items() if key in accepted(name)}
    optimizer = fusedopt.registry[name](mixed, **options, backend=backend)
    oracle = oracle_class(name)(exact, **options, foreach=False)
    for number in range(4, 8):
        give_gradients(mixed, number)
        for p, q in zip(mixed, exact):
            q.grad = None if p.grad is None else p.grad.double()
        optimizer.step()
        oracle.step()
    for dtype in DTYPES:
        ours, theirs = ([q.detach() for p, q in zip(mixed, params) if p.dtype is dtype] for params in (mixed, exact))
        close([p.double() for p in ours], theirs, AFTER_FOUR_STEPS[dtype])
        if dtype is not torch.float64:
            assert not all(torch.equal(p.double(), q) for p, q in zip(ours, theirs))
    states = optimizer.state_dict()["state"]
    for k, p in enumerate(mixed):
        assert all(value.dtype is p.dtype for key, value in states[k].items() if value.dim() and key != "step")


@pytest.fixture
def default_dtype():
    before = torch.get_default_dtype()
    yield torch.set_default_dtype
    torch.set_default_dtype(before)


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("settings", [{"amsgrad": True}, {"state_dtype": "8bit"}, {"max_grad_norm": 0.3}], ids=str)
def test_default_dtype_changes_no_bit(settings, default, default_dtype):
    """Not of step counts, of which bfloat16 would round the 301st, nor of scales and clip factors."""
    found = []
    for dtype in (torch.float32, default):
        p = torch.nn.Parameter(torch.linspace(-1, 1, 5000, dtype=torch.float32))
        optimizer = fusedopt.Adam([p], betas=(0.999, 0.9999), **settings)
        p.grad = p.detach() + 0.1
        optimizer.step()
        optimizer.state[p]["step"].fill_(300)
        default_dtype(dtype)
        for _ in range(3):
            optimizer.step()
        found.append([p.detach(), *optimizer.state[p].values()])
        default_dtype(torch.float32)
    assert all(map(torch.equal, *found))


def accepted(name):
    return oracle_class(name)(model("tiny")).defaults


@every_optimizer
@pytest.mark.parametrize("default", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_default_dtype(name, default):
    """Step counts are float32, or float64 under that default, as in torch; nothing else looks at it."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        pair = Pair(name, max_grad_norm=3.0)
        pair.step(3)
        pair.check()
        saved = [optimizer.state_dict()["state"] for optimizer in (pair.opt, pair.oracle)]
    finally:
        torch.set_default_dtype(before)
    kinds = [{k: [(key, value.dtype) for key, value in s.items()] for k, s in states.items()} for states in saved]
    assert kinds[0] == kinds[1]
    pair.step(2)
    close(pair.ours, pair.theirs, 1e-12)


@every_optimizer
def test_default_device(name):
    """Parameters elsewhere than on the default device; "meta" shows every tensor that is made there by mistake."""
    pair = Pair(name, max_grad_norm=3.0, flatten=True)
    pair.step(1)
    for number in range(pair.number, pair.number + 3):
        give_gradients(pair.ours, number)
        with torch.device("meta"):
            pair.opt.step()
            assert not pair.opt.grad_norm.is_meta
    fresh = Pair(name, {}, max_grad_norm=3.0)
    give_gradients(fresh.ours, 5)
    with torch.device("meta"):
        fresh.opt.step()
    fresh.number = 5
    give_gradients(fresh.theirs, 5, plain=True)
    torch.nn.utils.clip_grad_norm_(fresh.theirs, 3.0)
    fresh.oracle.step()
    fresh.check()


@every_torch_optimizer
@pytest.mark.parametrize("fused", [False, True])
def test_model_from_meta(name, fused):
    """torch's words while the parameters are on the meta device; after ``to_empty`` they are ordinary ones."""
    if fused and raised(lambda: oracle_class(name)(model("tiny"), fused=True)):
        pytest.skip("torch refuses fused=True")
    outcomes = []
    for cls in (fusedopt.registry[name], oracle_class(name)):
        with torch.device("meta"):
            module = torch.nn.Sequential(*[torch.nn.Linear(3, 3, dtype=torch.float64) for _ in range(3)])
        optimizer = cls(module.parameters(), **({"fused": True} if fused else {"foreach": False}))
        for p in module.parameters():
            p.grad = torch.ones_like(p)
        error = raised(optimizer.step)
        optimizer.state.clear()
        module.zero_grad()
        module.to_empty(device="cpu")
        for k, p in enumerate(module.parameters()):
            p.data.copy_(torch.full_like(p, k + 1.0))
            p.grad = torch.ones_like(p)
        optimizer.step()
        outcomes.append((str(error), list(module.parameters())))
    assert outcomes[0][0] == outcomes[1][0]
    close(outcomes[0][1], outcomes[1][1], 1e-14)


@every_optimizer
@pytest.mark.parametrize("kind", ["0-dim", "1-element", "int64", "float64", "int", "float"])
def test_step_counts_of_every_kind(name, kind):
    """What a checkpoint may hold for ``step``: each counts on where it stood."""
    convert = {
        "0-dim": lambda step: torch.tensor(float(step)),
        "1-element": lambda step: torch.tensor([float(step)]),
        "int64": lambda step: torch.tensor(int(step)),
        "float64": lambda step: torch.tensor(float(step), dtype=torch.float64),
        "int": int,
        "float": float,
    }[kind]
    pair = Pair(name, None, "tiny")
    pair.step(5)
    saved = copy.deepcopy(pair.opt.state_dict())
    for state in saved["state"].values():
        if "step" in state:
            state["step"] = convert(state["step"])
    pair.opt.load_state_dict(saved)
    pair.step(2)
    close(pair.ours, pair.theirs, 1e-12)
    for state in pair.opt.state_dict()["state"].values():
        assert "step" not in state or state["step"] == torch.tensor(7.0)


@every_optimizer_and_backend
@pytest.mark.parametrize("flag", [0, 1, None])
def test_flags_are_what_python_takes_for_true(name, flag, backend, device):
    """As for torch's own steps: configuration files say 0 and 1."""
    known = inspect.signature(fusedopt.registry[name]).parameters
    flags = {key: flag for key in ("maximize", "nesterov", "amsgrad", "centered") if key in known}
    if "nesterov" in flags:
        flags["momentum"] = 0.9
    pair = Pair(name, flags, "tiny", device=device, backend=backend)
    pair.step(2)
    pair.check()


@every_optimizer
def test_saved_and_copied_whole(name):
    """``torch.save`` of the optimizer itself, pickle, deepcopy: torch's public attributes, and the same course."""
    pair = Pair(name, None, "tiny", groups=False)
    pair.step(3)

    def public(optimizer):
        return {key for key in vars(optimizer) if not key.startswith("_")}

    def by_torch(both):
        file = io.BytesIO()
        torch.save(both, file)
        file.seek(0)
        return torch.load(file, weights_only=False)

    before = snapshot(pair.opt)
    copies = [
        carry((pair.ours, pair.opt)) for carry in (by_torch, lambda x: pickle.loads(pickle.dumps(x)), copy.deepcopy)
    ]
    pair.step(2)
    for params, optimizer in copies:
        assert public(optimizer) == public(pair.opt) == public(pair.oracle)
        assert repr(optimizer) == repr(pair.opt)
        assert_same(before, snapshot(optimizer))
        for number in (7, 8):
            give_gradients(params, number)
            optimizer.step()
        close(params, pair.theirs, 1e-12)


@every_optimizer
def test_names_in_a_profile(name):
    """``Optimizer.step#AdamW.step`` once per step, also where torch's own step does the work."""
    for options in ({}, {"differentiable": True}) if name in IN_TORCH else ({},):
        params = [p.detach().clone() for p in model("tiny")]
        optimizer = fusedopt.registry[name](params, **options)
        for p in params:
            p.grad = torch.ones_like(p)
        with profile(activities=[ProfilerActivity.CPU]) as record:
            optimizer.step()
            optimizer.zero_grad()
        events = {event.key: event.count for event in record.key_averages()}
        assert events[f"Optimizer.step#{name}.step"] == 1
        assert events[f"Optimizer.zero_grad#{name}.zero_grad"] == 1


def peak_memory(step):
    """The most bytes that one call has allocated on the CPU and not yet freed."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        step()
    now = most = 0
    for event in record.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


ELEMENTS = 1 << 21


@every_choice_of_options
def test_a_step_copies_no_parameter(name, options):
    """What a step allocates fits the cache, as large as the parameters may be; torch's foreach copies all of them.
    Where sums over each parameter scale the step, what is scaled is kept for one parameter at a time."""
    params = [torch.nn.Parameter(torch.ones(ELEMENTS)) for _ in range(2)]
    optimizer = fusedopt.registry[name](params, **options, max_grad_norm=None)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    # Twelve blocks of 2^17 elements of 4 bytes, and room for bookkeeping.
    kept = {"LAMB": 1, "StableAdamW": 2}.get(name, 0)
    assert peak_memory(optimizer.step) < (12 * (1 << 17) + kept * ELEMENTS) * 4 + 100_000
    # The instrument sees what torch allocates.
    foreach = torch.optim.RMSprop(params, foreach=True)
    foreach.step()
    assert peak_memory(foreach.step) > 4 * ELEMENTS


@pytest.mark.parametrize("late", [False, True], ids=["first step", "later"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@every_torch_optimizer
def test_gradients_that_are_no_numbers(name, dtype, late):
    """Where nothing skips them they make of a parameter, and of its state, what torch's for-loop makes of it."""
    bad = torch.tensor([1.0, float("inf"), -float("inf"), float("nan")], dtype=dtype).repeat(20)
    left = []
    for cls, options in ((fusedopt.registry[name], {}), (oracle_class(name), {"foreach": False})):
        p = torch.nn.Parameter(torch.ones(80, dtype=dtype))
        optimizer = cls([p], lr=LR, **options)
        for g in [torch.ones_like(bad)] * (7 if late else 0) + [bad]:
            p.grad = g.clone()
            optimizer.step()
        states = [optimizer.state[p][key] for key in sorted(optimizer.state[p]) if key != "step"]
        left.append([p.detach(), *(x for x in states if isinstance(x, torch.Tensor) and x.dim())])
    for mine, theirs in zip(*left, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=4 * torch.finfo(dtype).eps, atol=1e-7, equal_nan=True)
