"""Who is measured: fusedopt, torch's implementations, and other packages where they are installed.

An implementation makes an optimizer for a variant, or says why it cannot (``Missing``): nobody is left out silently.
"""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from variants import LR, Variant

import fusedopt

CLIPS = "fusedopt", "fusedopt flatten", "fusedopt 8-bit", "fusedopt one launch"
"""Those that clip inside their step; for the others ``clip_grad_norm_`` runs before it."""

TORCH = "forloop", "foreach", "fused", "compiled"
"""torch's own; the fastest of them is what ratios compare with."""

EXACT = 1e-4
"""What an implementation promises that computes in the parameters' dtype: after a few steps parameters are where
torch's float64 for-loop leads, but for this part of the way. float32 comes to 1e-7 on a CPU, and to 1e-5 where
1 - beta2 is formed in float32, as in torch's kernels for GPUs; a forgotten decay misses by 3e-4, clipping by more."""

EIGHT_BITS = 0.1
"""What it promises if its states have 8 bits. It moves fewer bytes, and stands in the tables as what it is."""


class Missing(Exception):
    """An implementation cannot run this case; the message says why."""


class Implementation(NamedTuple):
    name: str
    make: Callable[[Variant, list[dict[str, Any]], dict[str, Any]], torch.optim.Optimizer]
    """``make(variant, groups, settings)``, where groups carry their learning rate and settings are fusedopt's."""
    promise: float = EXACT


def ours(**settings: Any) -> Callable:
    def make(variant: Variant, groups: list[dict[str, Any]], more: dict[str, Any]) -> torch.optim.Optimizer:
        return fusedopt.registry[variant.name](groups, lr=LR, **variant.options, **settings, **more)

    return make


def one_launch(variant: Variant, groups: list[dict[str, Any]], more: dict[str, Any]) -> torch.optim.Optimizer:
    """With clipping. The kernels alone have launches to count."""
    chosen = fusedopt.backend(groups[0]["params"][0].device, more.get("backend"))
    if chosen.name != "triton":
        raise Missing(f"launches=1 is for the kernels: {chosen.reason}")
    return ours(launches=1)(variant, groups, more)


def torchs(**choice: bool) -> Callable:
    def make(variant: Variant, groups: list[dict[str, Any]], more: dict[str, Any]) -> torch.optim.Optimizer:
        cls = getattr(torch.optim, variant.name, None)
        if cls is None:
            raise Missing(f"torch {torch.__version__} has no {variant.name}")
        if not choice.keys() <= inspect.signature(cls).parameters.keys():
            raise Missing(f"torch {torch.__version__} has no {next(iter(choice))} {variant.name}")
        return cls(groups, lr=LR, **variant.options, **choice)

    return make


def package(module: str, prefix: str = "", suffix: str = "", **choice: Any) -> Callable:
    """The class of the same name, between ``prefix`` and ``suffix``, in a package; ``choice``: arguments of its own."""

    def make(variant: Variant, groups: list[dict[str, Any]], more: dict[str, Any]) -> torch.optim.Optimizer:
        try:
            found = importlib.import_module(module)
        except Exception as problem:  # a package built for another CUDA fails with whatever it likes
            raise Missing(f"{module} cannot be imported: {problem}") from problem
        name = f"{prefix}{variant.name}{suffix}"
        cls = getattr(found, name, None)
        if cls is None:
            raise Missing(f"{module} has no {name}")
        known = inspect.signature(cls).parameters
        numbers = ALIASES.get((module, variant.name), lambda numbers: numbers)(variant.numbers())
        unknown = {key: value for key, value in numbers.items() if key not in known}
        if any(unknown.values()):  # 0, False and None ask for nothing
            raise Missing(f"{module}.{name} has no {', '.join(key for key, value in unknown.items() if value)}")
        taken = {key: value for key, value in numbers.items() if key in known}
        try:
            return cls(groups, **taken, **{key: value for key, value in choice.items() if key in known})
        except (RuntimeError, ValueError, TypeError, NotImplementedError) as problem:
            raise Missing(f"{module}.{name}: {problem}") from problem

    return make


def _apex_adam(numbers: dict[str, Any]) -> dict[str, Any]:
    return {**numbers, "adam_w_mode": False}


def _apex_lamb(numbers: dict[str, Any]) -> dict[str, Any]:
    return {**numbers, "max_grad_norm": math.inf}  # where clipping is on, it runs before


ALIASES: dict[tuple[str, str], Callable[[dict[str, Any]], dict[str, Any]]] = {
    ("apex.optimizers", "Adam"): _apex_adam,
    ("apex.optimizers", "LAMB"): _apex_lamb,
}
"""Where a package calls arguments by other names, or has other defaults."""

IMPLEMENTATIONS = {
    implementation.name: implementation
    for implementation in (
        Implementation("fusedopt", ours()),
        Implementation("fusedopt flatten", ours(flatten=True)),
        Implementation("fusedopt 8-bit", ours(state_dtype="8bit"), EIGHT_BITS),
        Implementation("fusedopt one launch", one_launch),
        Implementation("forloop", torchs(foreach=False)),
        Implementation("foreach", torchs(foreach=True)),
        Implementation("fused", torchs(fused=True)),
        Implementation("compiled", torchs(foreach=True)),
        Implementation("optimi", package("optimi")),
        Implementation("pytorch_optimizer", package("pytorch_optimizer", foreach=True)),
        Implementation("bitsandbytes", package("bitsandbytes.optim")),
        Implementation("bitsandbytes 8-bit", package("bitsandbytes.optim", suffix="8bit"), EIGHT_BITS),
        # Without its compression it promises what torch does; with it, the bytes are another optimizer's.
        Implementation("flashoptim", package("flashoptim", prefix="Flash", quantize=False, master_weight_bits=None)),
        Implementation("flashoptim 8-bit", package("flashoptim", prefix="Flash"), EIGHT_BITS),
        Implementation("apex", package("apex.optimizers", prefix="Fused")),
    )
}
