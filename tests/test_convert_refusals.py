"""What ``fusedopt.convert`` cannot take over: it says why, and changes nothing."""

import math

import pytest
import torch
from cases import model
from test_convert import Named, pair_of
from torch.optim import lr_scheduler

import fusedopt


class Scaled(torch.optim.SGD):
    def step(self, closure=None):
        return super().step(closure)


class Grown(Named):
    def _init_group(self, *args):
        return super()._init_group(*args)


class Hiding(torch.optim.SGD):
    def lr(self):
        return self.param_groups[0]["lr"]


def monkeypatched():
    optimizer = torch.optim.SGD(model("tiny"))
    step = optimizer.step
    optimizer.step = lambda: step()
    return optimizer


def scheduled_after_a_patch():
    optimizer = Scaled(model("tiny"))
    lr_scheduler.StepLR(optimizer, 1)
    return optimizer


def with_attribute(name):
    optimizer = torch.optim.SGD(model("tiny"))
    setattr(optimizer, name, 0.1)
    return optimizer


class Wrapper(torch.optim.Optimizer):
    """As trainers have them: around an optimizer, and no subclass of its class."""

    def __init__(self, wrapped):
        self.wrapped = wrapped


REFUSED = {
    "no optimizer": (lambda: [1.0], "takes an optimizer of torch.optim, got list"),
    "a class": (lambda: torch.optim.SGD, "takes an optimizer of torch.optim, got type"),
    "unknown": (lambda: torch.optim.LBFGS(model("tiny")), "no LBFGS; it can take over .*AdamW.*SGD"),
    "wrapper": (lambda: Wrapper(torch.optim.SGD(model("tiny"))), "no Wrapper"),
    "fused already": (lambda: fusedopt.SGD(model("tiny")), "optimizer of fusedopt already: .*max_grad_norm = 1.0"),
    "own step": (lambda: Scaled(model("tiny")), "Scaled cannot be converted: Scaled has a step of its own"),
    "inherited step": (lambda: type("More", (Scaled,), {})(model("tiny")), "More cannot .* Scaled has a step"),
    "own scheduled step": (scheduled_after_a_patch, "Scaled has a step of its own"),
    "own states": (lambda: Grown(model("tiny")), "Grown has a step of its own"),
    "replaced step": (monkeypatched, "attribute 'step' was replaced"),
    "hidden method": (lambda: Hiding(model("tiny")), "attribute 'lr' would take the place"),
    "hidden setting": (lambda: with_attribute("max_grad_norm"), "attribute 'max_grad_norm' would take the place"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    make, message = REFUSED[case]
    optimizer = make()
    before = (type(optimizer), dict(vars(optimizer)) if hasattr(optimizer, "__dict__") else None)
    with pytest.raises(TypeError, match=message):
        fusedopt.convert(optimizer)
    assert type(optimizer) is before[0]
    assert before[1] is None or dict(vars(optimizer)) == before[1]


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"max_grad_norm": -1.0}, ValueError, "max_grad_norm"),
        ({"max_grad_nrom": 1.0}, TypeError, "max_grad_nrom"),
        ({"flatten": "yes"}, TypeError, "flatten"),
        ({"lr": 0.1}, TypeError, r"convert\(\) takes .* fusedopt's Adam adds, and lr is none"),
    ],
)
def test_wrong_settings_change_nothing(settings, error, message):
    (params, optimizer), _ = pair_of(torch.optim.Adam, {})
    with pytest.raises(error, match=message):
        fusedopt.convert(optimizer, **settings)
    assert type(optimizer) is torch.optim.Adam
    assert "_settings" not in vars(optimizer)
    with pytest.raises(ValueError, match="SGD with these options has no states"):
        fusedopt.convert(torch.optim.SGD(params), state_dtype="8bit")
    optimizer.param_groups[1]["weight_decay"] = math.nan
    with pytest.raises(ValueError, match="'weight_decay' of group 1 is nan"):
        fusedopt.convert(optimizer)
    optimizer.param_groups[0]["max_grad_norm"] = 1.0
    with pytest.raises(ValueError, match=r"max_grad_norm=.* beside the parameters"):
        fusedopt.convert(optimizer)
    assert type(optimizer) is torch.optim.Adam
