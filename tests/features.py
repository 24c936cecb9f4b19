"""Every feature of a step, and how a program that uses some of them looks: what test_feature_pairs.py combines.

A feature of the same kind excludes another; any two of different kinds make a pair.
"""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import torch
from options import NAMES, STATEFUL

import fusedopt

LR = 0.03
SCALE = 8.0
"""Of the loss, where there is one: a power of two does not round."""

SHAPES = [(7, 5), (300,), (6, 4), (), (0, 3)]
"""Whole groups of eight elements and a rest, a whole block of quantized ones and a rest, transposed, one, none."""

STEPS = 4
LATE, CHANGED, BAD = 0, 1, 2
"""The step at which a parameter has no gradient yet, the one before which options change, the one whose gradients hold
something that is not finite, and which a graph captures."""


@dataclasses.dataclass
class Program:
    """What somebody writes who uses some features."""

    name: str = "Adam"
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    second_group: dict[str, Any] = dataclasses.field(default_factory=dict)
    """What the second half of the parameters has instead."""
    tensor_rate: bool = False
    dtypes: tuple[torch.dtype, ...] = (torch.float32,)
    bad: float | None = None
    missing: bool = False
    layout: Callable[[torch.Tensor], torch.Tensor] = torch.clone
    """Of gradients."""
    scaler: str | None = None
    clips: bool = False
    releases: bool = False
    captures: bool = False
    carries: Callable[[Any], None] | None = None
    """Done to the optimizer in mid-training."""
    changes: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Options that change in mid-training."""


def option(**options):
    def use(program):
        program.options |= options

    return use


def setting(**settings):
    def use(program):
        program.settings |= settings

    return use


def attribute(**attributes):
    def use(program):
        vars(program).update(attributes)

    return use


def rule(name):
    def use(program):
        program.name = name
        program.options |= STATEFUL[name]

    return use


def stored(**settings):
    """Of 16 bits, unless another dtype is asked for."""

    def use(program):
        program.settings |= settings
        if program.dtypes == (torch.float32,):
            program.dtypes = (torch.bfloat16,)

    return use


def all_of(*uses):
    def use(program):
        for one in uses:
            one(program)

    return use


def reload(optimizer):
    optimizer.load_state_dict(optimizer.state_dict())


def reload_compact(optimizer):
    optimizer.load_state_dict(optimizer.state_dict(compact=True))


def misaligned(g):
    """At no multiple of 16 bytes."""
    memory = torch.empty(g.numel() + 1, dtype=g.dtype, device=g.device)
    return memory[1:].view(g.shape).copy_(g)


def transposed(g):
    return g.t().contiguous().t() if g.dim() == 2 else g.clone()


FEATURES = {
    # kind: {feature: what it does to a program}
    "rule": {name: rule(name) for name in NAMES if name != "Adam"},
    "norm": {
        "max_grad_norm": setting(max_grad_norm=4.0),
        "normalize": setting(max_grad_norm=4.0, grad_norm_mode="normalize"),
        "clip_grad_norm_": attribute(clips=True),
    },
    "units": {"adaptive_grad_clip": setting(adaptive_grad_clip=0.07)},
    "value": {
        "max_grad_value": setting(max_grad_value=0.8),
        "max_grad_value below": setting(max_grad_value=(-0.6, None)),
    },
    "skip": {"skip_nonfinite": setting(skip_nonfinite=True)},
    "bad": {"inf": attribute(bad=float("inf")), "nan": attribute(bad=float("nan"))},
    "scaler": {
        "GradScaler": attribute(scaler="ours"),
        "GradScaler.unscale_": attribute(scaler="ours, unscaled"),
        "torch.amp.GradScaler": attribute(scaler="torch"),
        "grad_scale, found_inf": attribute(scaler="attributes"),
    },
    "average": {"ema_decay": setting(ema_decay=0.9)},
    "cautious": {"cautious": setting(cautious=True)},
    "track": {"track total": setting(track="total"), "track parameters": setting(track="parameters")},
    "launches": {"launches=1": setting(launches=1), "launches=2": setting(launches=2)},
    "parameters": {"flatten": setting(flatten=True)},
    "gradients": {"flat_grads": setting(flat_grads=True), "zeroed": setting(flat_grads="zeroed")},
    "dtype": {
        "float64": attribute(dtypes=(torch.float64,)),
        "bfloat16": attribute(dtypes=(torch.bfloat16,)),
        "float16": attribute(dtypes=(torch.float16,)),
        "two dtypes": attribute(dtypes=(torch.float32, torch.float64)),
    },
    "master": {
        master: stored(master=master) for master in ("stochastic", "kahan", "split", "split8", "fp32")
    },
    "states": {
        "float32 states": stored(state_dtype=torch.float32),
        "bfloat16 states": stored(state_dtype=torch.bfloat16),
        "8-bit states": stored(state_dtype="8bit"),
    },
    "seed": {"seed": setting(seed=12345)},
    "device counts": {
        "capturable": option(capturable=True),
        "graph": all_of(option(capturable=True), attribute(captures=True)),
    },
    "lr": {"tensor lr": attribute(tensor_rate=True)},
    "ascent": {"maximize": option(maximize=True)},
    "decay": {"weight_decay": option(weight_decay=0.1)},
    "eps": {"eps_inside_sqrt": setting(eps_inside_sqrt=True)},
    "groups": {"groups": attribute(second_group={"lr": 0.01, "weight_decay": 0.05})},
    "release": {"gradient release": attribute(releases=True)},
    "missing": {"missing gradient": attribute(missing=True)},
    "layout": {
        "misaligned gradients": attribute(layout=misaligned),
        "transposed gradients": attribute(layout=transposed),
    },
    "change": {
        "lr changes": attribute(changes={"lr": 0.5 * LR}),
        "decay begins": attribute(changes={"weight_decay": 0.1}),
    },
    "carried": {"state_dict": attribute(carries=reload), "compact": attribute(carries=reload_compact)},
}  # fmt: skip
"""By kind."""

KINDS = {name: kind for kind, features in FEATURES.items() for name in features}
ORDER = list(KINDS)


def program(names):
    """One that uses these features."""
    made = Program()
    for name in sorted(names, key=ORDER.index):
        FEATURES[KINDS[name]][name](made)
    return made


def absent(program):
    """Arguments that the class does not have."""
    known = inspect.signature(fusedopt.registry[program.name]).parameters.keys()
    return (program.options | program.settings | program.second_group | program.changes).keys() - known
