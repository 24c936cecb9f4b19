"""How far from float64 an optimizer ends: ours and each of torch.optim's implementations, on the same numbers."""

import functools
import inspect
import math

import torch
from options import STATEFUL
from oracles import oracle_class

import fusedopt

STEPS, SIZE = 50, 4096
"""As many elements as 8-bit states begin with; two errors of so many differ by chance by about 1 %."""

OURS_ALONE = {
    "momentum_form velocity": ("SGD", {"momentum": 0.9}, {"momentum_form": "velocity"}),
    "momentum_form average": ("SGD", {"momentum": 0.9}, {"momentum_form": "average"}),
    "Adagrad, eps inside": ("Adagrad", {"eps": 1e-3}, {"eps_inside_sqrt": True}),
    "RMSprop, eps inside": ("RMSprop", {"eps": 1e-3}, {"eps_inside_sqrt": True}),
    "centered, eps inside": ("RMSprop", {"eps": 1e-3, "centered": True, "momentum": 0.9}, {"eps_inside_sqrt": True}),
    "Adam, eps inside": ("Adam", {"eps": 1e-3}, {"eps_inside_sqrt": True}),
    "AMSGrad, eps inside": ("AdamW", {"eps": 1e-3, "amsgrad": True}, {"eps_inside_sqrt": True}),
}
"""Formulas that torch lacks: the class, the options with which torch's is the nearest, and what makes it ours."""


def rate(step):
    """Not the same at all steps: how float32 rounds one number is chance, and the same for all elements."""
    return 0.01 * (1 + 0.13 * (step % 7))


@functools.cache
def problem(dtype, seed=0, steps=STEPS):
    """(start, gradients) in that dtype: noise around a mean, of sizes that differ."""
    generator = torch.Generator().manual_seed(seed)
    start, size, mean = (torch.randn(SIZE, generator=generator) for _ in range(3))
    size = torch.exp(0.5 * size)
    grads = [size * (0.5 * mean + torch.randn(SIZE, generator=generator)) for _ in range(steps)]
    return start.to(dtype), [g.to(dtype) for g in grads]


def end(make, numbers, dtype, device="cpu"):
    """``make(params)`` after all steps on these numbers in the dtype: (optimizer, parameter)."""
    start, grads = numbers
    p = torch.nn.Parameter(start.to(device, dtype, copy=True))
    optimizer = make([p])
    for step, g in enumerate(grads):
        p.grad = g.to(device, dtype, copy=True)
        optimizer.param_groups[0]["lr"] = rate(step)
        optimizer.step()
    return optimizer, p.detach()


def ours(name, numbers, dtype, device="cpu", **options):
    return end(lambda params: fusedopt.registry[name](params, lr=rate(0), **options), numbers, dtype, device)


def theirs(name, options, numbers, dtype, **more):
    cls = oracle_class(name)
    return end(lambda params: cls(params, lr=rate(0), **options, **more), numbers, dtype)[1]


def exact(name, options, numbers):
    """The for-loop in float64: torch.optim's, or the paper's."""
    return theirs(name, options, numbers, torch.float64, foreach=False)


def implementations(name):
    """Of torch.optim: what selects each. For those that it lacks the paper's, line by line."""
    cls = getattr(torch.optim, name, None)
    if cls is None:
        return {"for-loop": {"foreach": False}}
    found = {"for-loop": {"foreach": False}, "foreach": {"foreach": True}}
    if "fused" in inspect.signature(cls).parameters:
        found["fused"] = {"fused": True}
    return found


def error(x, wanted):
    """The root of the mean square."""
    return (x.cpu().double() - wanted).square().mean().sqrt().item()


def least_error(name, options, numbers, dtype, wanted):
    """Of the best of torch's implementations in this dtype; infinite where all of them overflow."""
    found = [error(theirs(name, options, numbers, dtype, **way), wanted) for way in implementations(name).values()]
    return min((x for x in found if math.isfinite(x)), default=math.inf)


def usual(name):
    """The option sets that stand for an optimizer where all would take too long."""
    return ({}, STATEFUL[name]) if STATEFUL[name] else ({},)
