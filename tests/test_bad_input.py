"""Bad input: torch's own exceptions where torch has one, else an error that says what and how; nothing changes."""

import inspect
import math

import pytest
import torch
from cases import (
    Pair,
    assert_same,
    clip_settings,
    every_optimizer,
    every_optimizer_and_backend,
    give_gradients,
    model,
    snapshot,
)

import fusedopt

HYPERPARAMETERS = [
    {"lr": -1.0},
    {"lr": math.nan},
    {"lr": "0.1"},
    {"lr": torch.ones(2)},
    {"lr": torch.tensor(-1.0)},
    {"eps": -1e-8},
    {"eps": math.nan},
    {"weight_decay": -0.1},
    {"weight_decay": math.nan},
    {"weight_decay": "0.1"},
    {"betas": (1.0, 0.9)},
    {"betas": (0.9, 1.0)},
    {"betas": (-0.1, 0.9)},
    {"betas": (math.nan, 0.9)},
    {"betas": (0.9, math.nan)},
    {"betas": 0.9},
    {"betas": (torch.tensor(0.9), 0.9)},
    {"momentum": -0.1},
    {"momentum": math.nan},
    {"dampening": math.nan},
    {"alpha": -0.1},
    {"alpha": math.nan},
    {"lr_decay": -0.1},
    {"lr_decay": math.nan},
    {"initial_accumulator_value": -0.1},
    {"initial_accumulator_value": math.nan},
    {"nesterov": True},
    {"nesterov": True, "momentum": 0.9, "dampening": 0.1},
    {"foreach": True, "fused": True},
    {"fused": True, "differentiable": True},
    {"lr": torch.tensor(0.1), "foreach": True},
    {"momentun": 0.9},
    {"max_grad_nrom": 1.0},
]


def accepted(name, options):
    """Whether torch.optim's class has these options; unknown names are for everyone."""
    known = inspect.signature(getattr(torch.optim, name)).parameters
    return all(key in known or key in ("momentun", "max_grad_nrom") for key in options)


def raised(call):
    try:
        call()
    except Exception as error:
        return error
    return None


@every_optimizer
@pytest.mark.parametrize(
    "options", [pytest.param(o, id=",".join(f"{k}={v}" for k, v in o.items())) for o in HYPERPARAMETERS]
)
def test_hyperparameters(name, options):
    if not accepted(name, options):
        return
    expected = raised(lambda: getattr(torch.optim, name)(model(), **options))
    error = raised(lambda: fusedopt.registry[name](model(), **options))
    if expected is not None:
        assert (type(error), str(error)) == (type(expected), str(expected))
    elif any(isinstance(value, float) and math.isnan(value) for value in options.values()):
        # torch overlooks it.
        assert isinstance(error, ValueError)
        assert next(iter(options)) in str(error)
        assert "nan" in str(error)
    else:
        assert error is None


PARAMETERS = {
    "nothing": list,
    "a tensor": lambda: torch.nn.Parameter(torch.ones(3)),
    "numbers": lambda: [1.0, 2.0],
    "text": lambda: ["weight"],
    "None": lambda: None,
    "a set": lambda: [{"params": set(model())}],
    "no leaf": lambda: [torch.ones(3, requires_grad=True) * 2],
    "no params": lambda: [{"lr": 0.1}],
    "in two groups": lambda: [{"params": [p]} for p in 2 * [torch.nn.Parameter(torch.ones(3))]],
    "half named": lambda: [("weight", torch.nn.Parameter(torch.ones(3))), torch.nn.Parameter(torch.ones(3))],
}


@every_optimizer
@pytest.mark.parametrize("kind", PARAMETERS)
def test_parameters(name, kind):
    expected = raised(lambda: getattr(torch.optim, name)(PARAMETERS[kind]()))
    error = raised(lambda: fusedopt.registry[name](PARAMETERS[kind]()))
    assert expected is not None
    assert (type(error), str(error)) == (type(expected), str(expected))


@every_optimizer_and_backend
def test_refused_groups_change_nothing(name, backend, device):
    pair = Pair(name, None, "tiny", device=device, backend=backend)
    pair.step(2)
    before = snapshot(pair.opt)
    fresh = torch.nn.Parameter(torch.ones(3, device=device))
    refused = [
        {"params": [pair.ours[0]]},
        {"params": ["x"]},
        {"params": [fresh * 2]},
        {"params": [fresh], "weight_decay": math.nan},
        {"params": [fresh], "lr": math.nan},
        [fresh],
    ]
    for group in refused:
        with pytest.raises((ValueError, TypeError)):
            pair.opt.add_param_group(group)
    assert_same(before, snapshot(pair.opt))
    pair.step(2)
    pair.check()


SETTINGS = [
    ("max_grad_norm", -1.0, ValueError),
    ("max_grad_norm", 0, ValueError),
    ("max_grad_norm", math.nan, ValueError),
    ("max_grad_norm", "1", TypeError),
    ("max_grad_norm", True, TypeError),
    ("max_grad_norm", (1.0, 2.0), TypeError),
    ("max_grad_norm", torch.tensor(1.0), TypeError),
    ("max_grad_value", -1.0, ValueError),
    ("max_grad_value", math.nan, ValueError),
    ("max_grad_value", True, TypeError),
    ("max_grad_value", "1", TypeError),
    ("max_grad_value", (1.0, -1.0), ValueError),
    ("max_grad_value", (0.0, 1.0, 2.0), ValueError),
    ("max_grad_value", (math.nan, 1.0), ValueError),
    ("max_grad_value", (None, "1"), TypeError),
    ("max_grad_value", (), ValueError),
    ("skip_nonfinite", 1, TypeError),
    ("skip_nonfinite", None, TypeError),
    ("flatten", "yes", TypeError),
    ("backend", "cuda", ValueError),
    ("backend", 1, (TypeError, ValueError)),
    ("backend", ["torch"], (TypeError, ValueError)),
]


@pytest.mark.parametrize(
    ("setting", "value", "error"), SETTINGS, ids=lambda x: str(x) if not isinstance(x, type) else ""
)
def test_settings(setting, value, error):
    with pytest.raises(error, match=setting):
        fusedopt.SGD(model(), **{setting: value})
    params = model()
    optimizer = fusedopt.SGD(params, max_grad_norm=2.0, max_grad_value=(-1.0, None), backend="torch")
    before = getattr(optimizer, setting)
    with pytest.raises(error, match=setting):
        setattr(optimizer, setting, value)
    assert getattr(optimizer, setting) == before


def test_settings_that_look_odd_and_are_right():
    import numpy as np

    optimizer = fusedopt.SGD(model(), max_grad_norm=np.float32(2), max_grad_value=[None, np.int64(3)])
    assert (optimizer.max_grad_norm, optimizer.max_grad_value) == (2.0, (None, 3.0))
    optimizer.max_grad_value = (None, None)
    assert optimizer.max_grad_value is None
    optimizer.max_grad_norm = math.inf
    assert optimizer.max_grad_norm == math.inf


ACTIVE = [
    {"max_grad_norm": 1.0},
    {"max_grad_value": 1.0},
    {"skip_nonfinite": True},
    {"flatten": True},
]


def make_sparse(params):
    params[1].grad = params[1].grad.to_sparse()


def make_complex(params):
    params[1].data = params[1].data + 1j
    params[1].grad = torch.ones_like(params[1])


@pytest.mark.parametrize("settings", ACTIVE, ids=lambda settings: next(iter(settings)))
@pytest.mark.parametrize("change", [make_sparse, make_complex, "differentiable"])
@pytest.mark.parametrize("name", ["SGD", "Adagrad"])
def test_settings_that_torchs_step_cannot_honour(name, change, settings):
    params = model("tiny")
    optimizer = fusedopt.registry[name](params, differentiable=change == "differentiable", **settings)
    give_gradients(params, 5, plain=True)
    if callable(change):
        change(params)
    before = snapshot(optimizer)
    grads = [p.grad.clone() for p in params]
    with pytest.raises(RuntimeError) as error:
        optimizer.step()
    message = str(error.value)
    assert next(iter(settings)) in message
    assert "parameter 1" in message or "parameter 0" in message
    assert {"make_sparse": "sparse", "make_complex": "complex"}.get(
        getattr(change, "__name__", ""), "differentiable"
    ) in message
    assert_same(before, snapshot(optimizer))
    assert all(torch.equal(p.grad.to_dense(), g.to_dense()) for p, g in zip(params, grads))


@pytest.mark.parametrize("name", ["Adam", "AdamW", "RMSprop"])
def test_capturable_is_refused_on_a_cpu_as_by_torch(name):
    errors = []
    for cls in (fusedopt.registry[name], getattr(torch.optim, name)):
        params = model("tiny")
        optimizer = cls(params, capturable=True)
        give_gradients(params, 5)
        errors.append(raised(optimizer.step))
    assert isinstance(errors[1], AssertionError)
    assert (type(errors[0]), str(errors[0])) == (type(errors[1]), str(errors[1]))


def wrong_shape(optimizer, params, key):
    optimizer.state[params[1]][key] = torch.zeros(3, dtype=torch.float64)
    return r"parameter 1 .*shape \(3,\)"


def wrong_numel(optimizer, params, key):
    optimizer.state[params[4]][key] = torch.zeros(5, 4, 1, dtype=torch.float64)
    return r"parameter 4 .*shape \(5, 4, 1\)"


def no_tensor(optimizer, params, key):
    optimizer.state[params[1]][key] = "x"
    return "parameter 1 .*str"


def wrong_step(optimizer, params, key):
    optimizer.state[params[1]]["step"] = "soon"
    return "'step' of parameter 1 .*'soon'"


def nan_step(optimizer, params, key):
    optimizer.state[params[1]]["step"].fill_(math.nan)
    return "'step' of parameter 1 .*nan"


def meta_state(optimizer, params, key):
    optimizer.state[params[1]][key] = torch.zeros(7, 5, device="meta")
    return "parameter 1 .*meta"


def wrong_gradient(optimizer, params, key):
    params[1].grad.data = torch.ones(5, 7, dtype=torch.float64, device=params[1].device)
    return r"gradient of parameter 1 .*\(5, 7\)"


def short_gradient(optimizer, params, key):
    params[1].grad.data = torch.ones(5, dtype=torch.float64, device=params[1].device)
    return r"gradient of parameter 1 .*\(5,\)"


BREAKAGES = [wrong_shape, wrong_numel, no_tensor, wrong_step, nan_step, meta_state, wrong_gradient, short_gradient]


@pytest.mark.parametrize("breakage", BREAKAGES)
@pytest.mark.parametrize("settings", ["none", "both"])
@every_optimizer_and_backend
def test_a_step_that_fails_changes_nothing(name, breakage, settings, backend, device):
    """Neither parameters, states, counts nor gradients; and mended, training goes on as if nothing had been."""
    if name == "SGD" and breakage in (wrong_step, nan_step):
        return  # SGD counts no steps
    kinds = ("tiny", "small") if backend == "torch" else ("tiny",)
    for kind in kinds:
        pair = Pair(name, None, kind, device=device, groups=False, backend=backend, **clip_settings(settings, kind))
        pair.step(5)
        give_gradients(pair.ours, 5, plain=True)
        key = [key for key in pair.opt.state[pair.ours[1]] if key != "step"][-1]
        entries = [dict(pair.opt.state[p]) for p in pair.ours]
        message = breakage(pair.opt, pair.ours, key)
        before, grads = snapshot(pair.opt), [p.grad.clone() for p in pair.ours]
        with pytest.raises(RuntimeError, match=message):
            pair.opt.step()
        assert_same(before, snapshot(pair.opt))
        assert all(torch.equal(p.grad, g) for p, g in zip(pair.ours, grads))
        for p, entry in zip(pair.ours, entries):
            pair.opt.state[p].update(entry)
        if breakage is nan_step:
            pair.opt.state[pair.ours[1]]["step"].copy_(pair.oracle.state[pair.theirs[1]]["step"])
        pair.step(2)
        pair.check()


def test_triton_without_a_gpu_or_the_interpreter(monkeypatch, device):
    if device.type != "cpu":
        pytest.skip("there is a GPU")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    params = model("tiny")
    optimizer = fusedopt.SGD(params, backend="triton")
    give_gradients(params, 5)
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match=r"backend='triton' cannot run on cpu: .*TRITON_INTERPRET=1.*'torch'"):
        optimizer.step()
    assert_same(before, snapshot(optimizer))
    optimizer.backend = None
    optimizer.step()


def test_expanded_parameters_are_refused_as_by_torch():
    """Elements that share memory cannot be written in place."""
    errors = []
    for cls in (fusedopt.Adam, torch.optim.Adam):
        p = torch.nn.Parameter(torch.zeros(1).expand(5))
        optimizer = cls([p])
        p.grad = torch.ones(5)
        errors.append(raised(optimizer.step))
        assert not p.any()
    assert all(isinstance(error, RuntimeError) for error in errors)
    assert "single memory location" in str(errors[0])
