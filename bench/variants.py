"""What is measured: every registered optimizer at its defaults, and the options that select another formula."""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import fusedopt

LR = 1e-4

OPTIONS: dict[str, dict[str, dict[str, Any]]] = {
    "SGD": {"momentum": {"momentum": 0.9}},
    "RMSprop": {
        "momentum": {"momentum": 0.9},
        "centered": {"centered": True},
        "centered-momentum": {"centered": True, "momentum": 0.9},
    },
    "Adam": {"amsgrad": {"amsgrad": True}},
}
"""Beside the defaults of each optimizer: a label, and the options that it stands for."""


class Variant(NamedTuple):
    label: str
    name: str
    """In ``fusedopt.registry`` and, where torch has it, in ``torch.optim``."""
    options: dict[str, Any]

    def numbers(self) -> dict[str, Any]:
        """Every hyperparameter that this variant sets or leaves at our default, by torch's name."""
        cls = fusedopt.registry[self.name]
        no_numbers = {*HINTS, *cls.settings_class.fields()}
        parameters = inspect.signature(cls).parameters.values()
        taken = {p.name: p.default for p in parameters if p.name not in no_numbers and p.default is not p.empty}
        return taken | self.options | {"lr": LR}


HINTS = {"foreach", "fused", "capturable", "differentiable"}
"""Arguments that say how to run, not what to compute."""


def variants() -> dict[str, Variant]:
    """By label, from the registry."""
    found = [
        Variant(f"{name}-{label}" if label else name, name, options)
        for name in fusedopt.registry
        for label, options in {"": {}, **OPTIONS.get(name, {})}.items()
    ]
    return {variant.label: variant for variant in found}


VARIANTS = variants()
