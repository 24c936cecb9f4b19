"""Bad input: torch's own exceptions where torch has one, else an error that says what and how; nothing changes."""

import inspect
import math

import pytest
import torch
from cases import every_optimizer, every_optimizer_and_backend, give_gradients, model
from options import IN_TORCH
from pairs import Pair, assert_same, raised, snapshot

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


def judge(name):
    """The class that says what is refused, and in which words: torch's AdamW for those that torch lacks."""
    return getattr(torch.optim, name, torch.optim.AdamW)


def accepted(name, options):
    """Whether both classes have these options; unknown names are for everyone."""
    known = inspect.signature(judge(name)).parameters.keys() & inspect.signature(fusedopt.registry[name]).parameters
    return all(key in known or key in ("momentun", "max_grad_nrom") for key in options)


def completed(name, options):
    """The options with as many betas as the optimizer takes."""
    default = inspect.signature(fusedopt.registry[name]).parameters.get("betas")
    if default is None or not isinstance(options.get("betas"), tuple):
        return options
    return {"betas": (*options["betas"], *default.default[2:])}


@every_optimizer
@pytest.mark.parametrize(
    "options", [pytest.param(o, id=",".join(f"{k}={v}" for k, v in o.items())) for o in HYPERPARAMETERS]
)
def test_hyperparameters(name, options):
    if not accepted(name, options):
        return
    expected = raised(lambda: judge(name)(model(), **options))
    error = raised(lambda: fusedopt.registry[name](model(), **completed(name, options)))
    if expected is not None and name not in IN_TORCH:
        assert type(error) is type(expected)
        assert str(error) == str(expected) or next(iter(options)).removesuffix("s") in str(error)
    elif expected is not None:
        assert (type(error), str(error)) == (type(expected), str(expected))
    elif any(isinstance(value, float) and math.isnan(value) for value in options.values()):
        # torch overlooks it.
        assert isinstance(error, ValueError)
        assert next(iter(options)) in str(error)
        assert "nan" in str(error)
    else:
        assert error is None


@every_optimizer_and_backend
def test_learning_rates_that_no_step_can_use(name, backend, device):
    """torch would make the parameters NaN."""
    with pytest.raises(ValueError, match=r"Invalid .*inf"):
        fusedopt.registry[name](model("tiny"), lr=math.inf)
    pair = Pair(name, None, "tiny", device=device, backend=backend, max_grad_norm=1.0)
    pair.step(2)
    before = snapshot(pair.opt)
    group = pair.opt.param_groups[1]
    bad = [(ValueError, math.inf), (ValueError, math.nan), (ValueError, torch.tensor(math.inf))]
    bad += [(TypeError, None), (TypeError, "0.1")]
    bad += [(ValueError, torch.ones(2)), (RuntimeError, torch.ones((), device="meta"))]
    for error, lr in bad:
        good, group["lr"] = group["lr"], lr
        with pytest.raises(error, match=r"learning rate.*group 1|lr.*group 1"):
            pair.opt.step()
        group["lr"] = good
        assert_same(before, snapshot(pair.opt))
    assert pair.opt.skipped_steps == 0
    pair.step()
    pair.check()


@pytest.mark.parametrize("name", ["Adam", "Lion"])
def test_a_learning_rate_on_another_device_than_a_graph_needs(name, needs_triton, device):
    params = model("tiny", device=device)
    optimizer = fusedopt.registry[name](params, lr=0.1, capturable=True, backend="triton")
    give_gradients(params, 5)
    optimizer.step()
    before = snapshot(optimizer)
    optimizer.param_groups[0]["lr"] = torch.ones((), device="meta")
    with pytest.raises(RuntimeError, match=f"group 0 is a tensor on meta, its parameters are on {device.type}"):
        optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.1
    assert_same(before, snapshot(optimizer))


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
    expected = raised(lambda: judge(name)(PARAMETERS[kind]()))
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
        {"params": [fresh], "max_grad_norm": 1.0},
        [fresh],
    ]
    for group in refused:
        with pytest.raises((ValueError, TypeError)):
            pair.opt.add_param_group(group)
    assert_same(before, snapshot(pair.opt))
    pair.step(2)
    pair.check()


@every_optimizer
def test_negative_learning_rate_of_a_group(name):
    """torch's classes take it, and ours of that name; where torch has no class it is refused."""
    fresh = [torch.nn.Parameter(torch.ones(3))]
    optimizer = fusedopt.registry[name](model())
    error = raised(lambda: optimizer.add_param_group({"params": fresh, "lr": -1.0}))
    if name in IN_TORCH:
        getattr(torch.optim, name)(model()).add_param_group({"params": fresh, "lr": -1.0})
        assert error is None
    else:
        assert (type(error), str(error)) == (ValueError, "Invalid learning rate: -1.0")
        assert len(optimizer.param_groups) == 1


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
    ("grad_norm_mode", "scale", ValueError),
    ("grad_norm_mode", None, ValueError),
    ("grad_norm_mode", ["clip"], (TypeError, ValueError)),
    ("momentum_form", "nesterov", ValueError),
    ("flatten", "yes", TypeError),
    ("backend", "cuda", ValueError),
    ("backend", 1, (TypeError, ValueError)),
    ("master", "fp16", ValueError),
    ("master", True, ValueError),
    ("state_dtype", "4bit", ValueError),
    ("state_dtype", torch.float16, ValueError),
    ("state_dtype", torch.int8, ValueError),
    ("seed", -1, ValueError),
    ("seed", 0.5, TypeError),
    ("seed", True, TypeError),
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


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16, "8bit"], ids=str)
def test_a_state_dtype_needs_states(state_dtype):
    """When it is set later, too."""
    with pytest.raises(ValueError, match=r"state_dtype=.* has no states"):
        fusedopt.SGD(model(), state_dtype=state_dtype)
    optimizer = fusedopt.SGD(model())
    with pytest.raises(ValueError, match=r"state_dtype=.* has no states"):
        optimizer.state_dtype = state_dtype
    assert optimizer.state_dtype is None


def test_backends_that_there_are():
    with pytest.raises(ValueError, match="Invalid backend: 'jax'; choose 'torch', 'triton' or None"):
        fusedopt.backend("cpu", "jax")


def test_settings_that_look_odd_and_are_right():
    import numpy as np

    optimizer = fusedopt.SGD(model(), max_grad_norm=np.float32(2), max_grad_value=[None, np.int64(3)])
    assert (optimizer.max_grad_norm, optimizer.max_grad_value) == (2.0, (None, 3.0))
    optimizer.max_grad_value = (None, None)
    assert optimizer.max_grad_value is None
    optimizer.max_grad_norm = math.inf
    assert optimizer.max_grad_norm == math.inf
    optimizer = fusedopt.Adam(model(), state_dtype="bfloat16")
    assert optimizer.state_dtype is torch.bfloat16


@pytest.mark.parametrize("name", ["SGD", "Adam", "Lion"])
@pytest.mark.parametrize("rate", [1, "array", "float32", "Fraction"])
def test_learning_rates_of_every_kind(name, rate, device):
    import fractions

    import numpy as np

    kinds = {"array": np.array(0.25), "float32": np.float32(0.25), "Fraction": fractions.Fraction(1, 4)}
    rate = kinds.get(rate, rate)
    found = []
    for lr in (rate, float(rate)):
        params = model("tiny", device=device)
        optimizer = fusedopt.registry[name](params, lr=lr)
        give_gradients(params, 5)
        optimizer.step()
        found.append(params)
    assert all(map(torch.equal, *found))
    with pytest.raises(TypeError, match="group 0 must be a number, got array"):
        optimizer.param_groups[0]["lr"] = np.ones(2)
        optimizer.step()
