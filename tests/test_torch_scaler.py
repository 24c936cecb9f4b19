"""torch.amp.GradScaler: parameters, scale history and step counts are those of torch's optimizer under its own scaler.

How ``fusedopt.GradScaler`` does the same without an extra pass is in test_amp.py.
"""

import functools
import math

import pytest
import torch
from cases import KERNEL_NAMES, every_optimizer, every_optimizer_and_backend, model
from options import NAMES, STATEFUL
from oracles import oracle_class
from pairs import Pair, close, raised, same_bits
from thinning import every_pair

import fusedopt

FUSED = [
    name
    for name in NAMES
    if hasattr(torch.optim, name) and raised(lambda n=name: getattr(torch.optim, n)(model("tiny"), fused=True)) is None
]
"""Classes that take ``fused=True`` in torch: there the scaler leaves unscaling and the check to the step."""

OLD_ADAGRAD = not hasattr(torch.optim.Adagrad(model("tiny"), fused=True), "_step_supports_amp_scaling")
SUPPORTS_SCALING = {name: not (name == "Adagrad" and OLD_ADAGRAD) for name in FUSED}
"""torch before 2.12 forgot it."""

BAD = {0: math.inf, 3: math.nan, 4: -math.inf}
"""Steps with a bad gradient; two in a row, and the very first."""


def scaler_of(device):
    # Powers of two, which scaling divides out exactly, growing and falling on the way.
    return torch.amp.GradScaler(device.type, init_scale=1024.0, growth_interval=2)


def backward(scaler, params, number, bad):
    """Gradients as of a scaled loss, one for each parameter, with a bad element in one of them."""
    for p in params:
        p.grad = None
    weights = [math.sin(number + k) for k in range(len(params))]
    scaler.scale(sum(w * (p * p).sum() for w, p in zip(weights, params))).backward()
    if bad:
        params[1].grad[0, 0] = bad


LOOPS = {
    # name: (settings of ours, whether the loop unscales, whether it clips, whether the oracle clips)
    "plain": ({}, False, False),
    "unscale": ({}, True, False),
    "unscale and clip": ({}, True, True),
    "clip inside": ({"max_grad_norm": 0.7, "max_grad_value": 0.2}, False, False),
    "unscale, clip inside": ({"max_grad_norm": 0.7}, True, False),
}


def run(scaler, params, optimizer, unscale, clips, settings, history):
    """Seven steps as users write them; ``settings``: what torch's users do by hand."""
    for number in range(7):
        backward(scaler, params, number, BAD.get(number))
        if unscale:
            scaler.unscale_(optimizer)
        if clips:
            torch.nn.utils.clip_grad_norm_(params, 0.5)
        if settings.get("max_grad_norm"):
            torch.nn.utils.clip_grad_norm_(params, settings["max_grad_norm"])
        if settings.get("max_grad_value"):
            torch.nn.utils.clip_grad_value_(params, settings["max_grad_value"])
        scaler.step(optimizer)
        scaler.update()
        history.append(scaler.get_scale())


CASES = [
    (name, "torch", fused, loop)
    for name in NAMES
    for fused in (False, True)
    if not fused or name in FUSED
    for loop in LOOPS
]
# Unscaled by torch, the kernels see what they see without a scaler.
CASES += [(name, "triton", name in FUSED, loop) for name in KERNEL_NAMES for loop in LOOPS if "unscale" not in loop]


@every_pair
@pytest.mark.parametrize(("name", "backend", "fused", "loop"), CASES, indirect=["backend"])
def test_like_torchs_optimizer(name, backend, fused, loop, device):
    settings, unscale, clips = LOOPS[loop]
    flag = {"fused": True} if fused else {}
    pair = Pair(name, None, "tiny", device=device, backend=backend, **settings, **flag)
    assert getattr(pair.opt, "_step_supports_amp_scaling", False) == (fused and SUPPORTS_SCALING[name])
    histories = [], []
    run(scaler_of(device), pair.ours, pair.opt, unscale, clips, {}, histories[0])
    needs_unscaling = unscale or bool(settings)
    run(scaler_of(device), pair.theirs, pair.oracle, needs_unscaling, clips, settings, histories[1])
    assert histories[0] == histories[1]
    assert len(set(histories[0])) >= 3
    pair.check()


@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("flag", [False, True])
def test_what_tells_the_scaler_to_leave_it_to_the_step(name, flag):
    """torch's attribute, with torch's value: Lightning, for one, refuses its own clipping where it is set."""
    ours, theirs = (
        cls(model("tiny"), fused=flag or None) for cls in (fusedopt.registry[name], getattr(torch.optim, name))
    )
    assert getattr(ours, "_step_supports_amp_scaling", None) == getattr(theirs, "_step_supports_amp_scaling", None)
    assert getattr(ours, "_step_supports_amp_scaling", False) is (flag and SUPPORTS_SCALING[name])


@every_optimizer_and_backend
def test_attributes_are_honoured_whoever_sets_them(name, backend, device):
    """``found_inf`` and ``grad_scale``, together or alone, without the flag, too."""
    one = torch.ones((), device=device)
    pair = Pair(name, None, "tiny", device=device, groups=False, backend=backend, start=0)
    params, optimizer = pair.ours, pair.opt
    before = [p.detach().clone() for p in params]

    def gradients(scale):
        for p in params:
            p.grad = p.detach() * scale

    gradients(1.0)
    for attributes in ({"found_inf": one}, {"found_inf": one, "grad_scale": one * 4}, {"found_inf": one[None] * 2}):
        vars(optimizer).update(attributes)
        optimizer.step()
        for key in attributes:
            delattr(optimizer, key)
        assert all(map(same_bits, params, before))
        for state in optimizer.state_dict()["state"].values():
            assert state.get("step", 0) == 0
    for scale, attributes in (
        (4.0, {"grad_scale": one * 4}),
        (2.0, {"grad_scale": one[None] * 2, "found_inf": one * 0}),
        (1.0, {"found_inf": one * 0}),
        (1.0, {}),
        (1.0, {"found_inf": None, "grad_scale": None}),
    ):
        gradients(scale)
        vars(optimizer).update(attributes)
        optimizer.step()
        for key in attributes:
            delattr(optimizer, key)
        for p, q in zip(pair.theirs, params):
            q.grad = None
            p.grad = p.detach().clone()
        pair.oracle.step()
    pair.check()


def test_attributes_of_torchs_fused_step(device):
    """torch's fused Adam itself, with attributes that a scaler would set."""
    results = []
    for cls in (fusedopt.Adam, torch.optim.Adam):
        p = torch.nn.Parameter(torch.linspace(1, 2, 6, device=device))
        optimizer = cls([p], lr=0.1, fused=True)
        states = []
        for found_inf in (1.0, 0.0, 1.0, 0.0):
            p.grad = torch.full_like(p, 8.0)
            optimizer.grad_scale = torch.tensor(4.0, device=device)
            optimizer.found_inf = torch.tensor(found_inf, device=device)
            optimizer.step()
            states.append([s.detach().clone() for s in optimizer.state_dict()["state"][0].values()])
        results.append([p, *(s for step in states for s in step)])
    # float32: one division and a dozen roundings. Of step counts torch makes float32 on the GPU, ours stay on the host.
    close([x.float().cpu() for x in results[0]], [x.float().cpu() for x in results[1]], 1e-6)


@every_optimizer
def test_several_optimizers_under_one_scaler(name, device):
    """Only the one with the bad gradient skips; the scale falls for all."""
    results = []
    oracle = functools.partial(oracle_class(name), foreach=False)
    for library, make in ((fusedopt, fusedopt.registry[name]), (torch.optim, oracle)):
        options = {"lr": 0.03, **STATEFUL[name]}
        params = [model("tiny", device=device), model("tiny", device=device)]
        optimizers = [
            make(params[0], **options),
            library.SGD(params[1], lr=0.1),
        ]
        scaler, history = scaler_of(device), []
        for number in range(7):
            for which, (its, optimizer) in enumerate(zip(params, optimizers)):
                backward(scaler, its, number, BAD.get(number) if which == number % 2 else None)
                scaler.step(optimizer)
            scaler.update()
            history.append(scaler.get_scale())
        results.append((history, params, [o.state_dict()["state"] for o in optimizers]))
    assert results[0][0] == results[1][0]
    for ours, theirs in zip(results[0][1], results[1][1]):
        close(ours, theirs, 1e-12)
    for ours, theirs in zip(results[0][2], results[1][2]):
        assert [state.get("step") for state in ours.values()] == [state.get("step") for state in theirs.values()]


@every_optimizer
def test_accumulated_gradients(name, device):
    """Two backward passes of one scale before each step."""
    pair = Pair(name, None, "tiny", device=device)
    for params, optimizer in ((pair.ours, pair.opt), (pair.theirs, pair.oracle)):
        scaler = scaler_of(device)
        for number in range(5):
            optimizer.zero_grad()
            for part in range(2):
                loss = sum((p * math.cos(number + part)).square().sum() for p in params)
                scaler.scale(loss * (math.inf if (number, part) == (2, 1) else 1.0)).backward()
            scaler.step(optimizer)
            scaler.update()
        assert scaler.get_scale() == 2048.0
    pair.check()


def test_scaler_without_scaling(device):
    results = []
    # torch's fused kernel is wrong where a gradient's strides are not its parameter's.
    for cls, flag in ((fusedopt.AdamW, {"fused": True}), (torch.optim.AdamW, {"foreach": False})):
        params = model("tiny", device=device)
        optimizer = cls(params, **flag)
        scaler = torch.amp.GradScaler(device.type, enabled=False)
        for number in range(3):
            backward(scaler, params, number, None)
            scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
        results.append(params)
    close(*results, 1e-12)
