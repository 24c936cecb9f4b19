"""Steps that cannot be taken: the error says what and how, and nothing has changed."""

import copy
import math
import os
import sys

import pytest
import torch
from cases import KINDS_AND_BACKENDS, clip_settings, give_gradients, model
from options import LR, STATEFUL
from oracles import oracle_class
from pairs import Pair, assert_same, raised, snapshot
from thinning import every_pair

import fusedopt
from fusedopt.cohorts import StoredScalars
from fusedopt.counts import Counts
from fusedopt.engine import Engine

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
    for cls in (fusedopt.registry[name], oracle_class(name)):
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


OF_STEPS = wrong_step, nan_step
BREAKAGES = [wrong_shape, wrong_numel, no_tensor, *OF_STEPS, meta_state, wrong_gradient, short_gradient]


@every_pair
@pytest.mark.parametrize(
    ("name", "backend", "breakage"),
    # SGD counts no steps.
    [
        (*of, how)
        for of in KINDS_AND_BACKENDS
        for how in BREAKAGES
        if "SGD" not in of or how not in (wrong_step, nan_step)
    ],
    indirect=["backend"],
)
@pytest.mark.parametrize("settings", ["none", "both"])
def test_a_step_that_fails_changes_nothing(name, breakage, settings, backend, device):
    """Neither parameters, states, counts nor gradients; and mended, training goes on as if nothing had been."""
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


def test_a_sparse_state_beside_a_dense_gradient():
    params = model("tiny")
    optimizer = fusedopt.Adam(params)
    for _ in range(2):
        give_gradients(params, 5, plain=True)
        optimizer.step()
    before = [p.detach().clone() for p in params]
    optimizer.state[params[1]]["exp_avg"] = optimizer.state[params[1]]["exp_avg"].to_sparse()
    with pytest.raises(RuntimeError, match=r"state 'exp_avg' of parameter 1 .* is sparse"):
        optimizer.step()
    assert all(map(torch.equal, params, before))


class Interrupt(BaseException):
    """As KeyboardInterrupt, which pytest takes for its own."""


def interrupt(step, line):
    """Take a step, and interrupt it at that line of the package's code, or where the update begins. Returns the
    number of lines before, or None where the step came to its end."""
    package, lines = os.path.dirname(fusedopt.__file__), 0

    def trace(frame, event, arg):
        nonlocal lines
        if not frame.f_code.co_filename.startswith(package):
            return None
        lines += event == "line"
        if lines == line or frame.f_code is Engine._run.__code__:
            sys.settrace(None)
            raise Interrupt
        return trace

    sys.settrace(trace)
    try:
        step()
    except Interrupt:
        return lines
    finally:
        sys.settrace(None)


@every_pair
@pytest.mark.parametrize("begins", ["without states", "with loaded states"])
@pytest.mark.parametrize("settings", [{"ema_decay": 0.9}, {"flatten": True}, {"state_dtype": torch.float32}], ids=str)
@pytest.mark.parametrize("name", ["Adagrad", "ASGD", "SGD"])
def test_an_interrupt_before_the_update_loses_nothing(name, settings, begins):
    """Ctrl-C while a step is planned: the next one does what that one would have done."""

    def build():
        params = model("small", torch.float32)
        optimizer = fusedopt.registry[name](params, **{"lr": LR, **STATEFUL[name]}, **settings)
        if begins == "with loaded states":
            for number in (4, 5):
                give_gradients(params, number)
                optimizer.step()
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            optimizer.load_ema_state_dict({k: x.clone() for k, x in optimizer.ema_state_dict().items()})
        give_gradients(params, 6)
        return optimizer

    expected = build()
    lines = interrupt(build().step, math.inf)
    expected.step()
    for line in range(lines % 89, lines, max(1, lines // 12)):
        optimizer = build()
        assert interrupt(optimizer.step, line) is not None
        assert torch.is_grad_enabled()
        optimizer.step()
        assert_same(snapshot(optimizer), snapshot(expected))
        assert all(map(torch.equal, optimizer._ema.values(), expected._ema.values()))


@pytest.mark.parametrize(("name", "cls", "method"), [("NAdam", StoredScalars, "write"), ("Adam", Counts, "advance")])
def test_behind_an_interrupt_the_states_say_what_was_counted(name, cls, method, monkeypatch):
    def interrupted(*_):
        raise Interrupt

    params = model("small")
    optimizer = fusedopt.registry[name](params, lr=LR)
    for number in range(4):
        give_gradients(params, 4 + number)
        if number < 3:
            optimizer.step()
    with monkeypatch.context() as patch:
        patch.setattr(cls, method, interrupted)
        with pytest.raises(Interrupt):
            optimizer.step()
    others, other = copy.deepcopy((params, optimizer))
    for number in range(2):
        for each, stepped in ((params, optimizer), (others, other)):
            give_gradients(each, 9 + number)
            stepped.step()
    assert_same(snapshot(optimizer), snapshot(other))


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
