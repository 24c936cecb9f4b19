"""``check_rule``: the Triton function and the torch twin of a rule, side by side on random numbers."""

from __future__ import annotations

import importlib.util
import itertools
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .backends import backend, triton_problem
from .optimizer import FusedOptimizer
from .rule import Numbers, Rule

TOLERANCES = {torch.float64: 1e-11, torch.float32: 3e-6}
"""Relative to a number and to the mean size of its tensor. Both sides compute the same formula in another order: two
dozen roundings of 1.1e-16 or 6e-8 at most, while a wrong formula, or a number that was float32 on its way, shows."""


class Case(NamedTuple):
    """One tensor of a check."""

    dtype: torch.dtype
    size: int
    magnitude: float

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')}, {self.size} gradients of magnitude {self.magnitude:g}"


class _Probe(FusedOptimizer, register=False):
    """An optimizer whose parameters, 0 before a step, are -u after it."""

    def __init__(self, params: Any, rule: Rule, hyper: Callable[[int], Numbers], initial: dict[str, float]):
        self.checked, self.numbers, self.initial = rule, hyper, initial
        super().__init__(params, {"lr": 1.0}, backend="triton")

    def rule(self, group: dict[str, Any]) -> Rule:
        return self.checked

    def hyper(self, group: dict[str, Any], t: int) -> Numbers:
        return self.numbers(t)

    def initial_value(self, group: dict[str, Any], key: str) -> float:
        return self.initial[key]


def check_rule(
    rule: Rule | type[FusedOptimizer],
    h: Numbers | None = None,
    *,
    steps: int = 3,
    sizes: Sequence[int] = (1, 37, 1025),
    magnitudes: Sequence[float] = (0.0, 1e-8, 1.0, 1e8),
    seed: int = 0,
    **options: Any,
) -> None:
    """Compare a rule's Triton function with its torch twin, and both with what the engine expects of them.

    In float64 and float32, over a few steps from the rule's own states: u and every new state, element by element;
    the twin leaves g alone, updates the states in place, and treats every element alike whatever stands beside it.
    Runs on a GPU, or in Triton's interpreter: ``python -m fusedopt check FILE`` does so for the optimizers of a file.

    Args:
        rule: a ``Rule``, or an optimizer class, whose rule and numbers at ``options`` are then used.
        h: the numbers of a ``Rule``; a class computes them itself.
        steps: how many steps, counted from 1; a class's numbers may depend on the count.
        sizes: elements of the tensors.
        magnitudes: the sizes of their gradients, one tensor for each size and magnitude. An eighth of it is 0.
        seed: of the random numbers.
        options: of the class, e.g. ``betas=(0.5, 0.9)``.

    Raises:
        AssertionError: names the first difference: u or which state, its index, both values; or the broken promise.
        TypeError: for anything but a rule or a class, ``h`` beside a class, ``options`` beside a rule.
        RuntimeError: where Triton functions cannot run.
    """
    rule, numbers, initial = _subject(rule, h, options)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if problem := triton_problem():
        raise RuntimeError(f"check_rule runs the Triton function, and {problem}")
    try:
        backend(device, "triton")
    except RuntimeError as problem:
        raise RuntimeError(
            f"check_rule runs the Triton function, and {problem.args[0].partition(': ')[2].partition(';')[0]}: set "
            "TRITON_INTERPRET=1 before the program starts, or run python -m fusedopt check FILE"
        ) from None
    for dtype in TOLERANCES:
        cases = [Case(dtype, size, magnitude) for size, magnitude in itertools.product(sizes, magnitudes)]
        params = [torch.nn.Parameter(torch.zeros(case.size, dtype=dtype, device=device)) for case in cases]
        probe = _Probe(params, rule, numbers, initial)
        generator = torch.Generator().manual_seed(seed)
        for t in range(1, steps + 1):
            for p, case in zip(params, cases):
                p.detach().zero_()
                p.grad = _random(case, generator).to(device)
            _check_step(probe, cases, t)


def check_file(path: Path) -> dict[str, str]:
    """``check_rule`` of every optimizer class that a Python file defines, each at its defaults: what is wrong with it,
    or an empty string, by name. Without a GPU in Triton's interpreter, if Triton was not yet imported."""
    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or not path.is_file():
        raise ValueError(f"{path} is not a Python file")
    sys.path.insert(0, str(path.parent))  # what stands beside it can be imported, as from a script
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    report = {}
    for name, cls in list(vars(module).items()):  # rewriting functions for the interpreter adds names
        if isinstance(cls, type) and issubclass(cls, FusedOptimizer) and cls.__module__ == path.stem:
            try:
                check_rule(cls)
                report[name] = ""
            except AssertionError as difference:
                report[name] = str(difference)
            except Exception as error:  # the other classes shall be checked all the same
                report[name] = f"{type(error).__name__}: {error}"
    return report


def _subject(rule: Any, h: Numbers | None, options: dict[str, Any]) -> tuple[Rule, Callable, dict[str, float]]:
    """The rule, its numbers by step, and its initial states."""
    if isinstance(rule, Rule):
        if h is None or options:
            raise TypeError("a Rule is checked with its numbers: check_rule(rule, h); options are for a class")
        return rule._replace(averages=()), lambda t: h, dict.fromkeys(rule.states, 0.0)
    if not (isinstance(rule, type) and issubclass(rule, FusedOptimizer)):
        raise TypeError(f"check_rule takes a fusedopt.Rule or a subclass of fusedopt.FusedOptimizer, got {rule!r}")
    if h is not None:
        raise TypeError(f"{rule.__name__} computes its numbers itself: leave h out, and give options instead")
    optimizer = rule([torch.nn.Parameter(torch.zeros(1))], **options)
    group = optimizer.param_groups[0]
    found = optimizer.rule(group)

    def numbers(t: int) -> Numbers:
        scalars = optimizer.initial_scalars(group)
        for earlier in range(1, t if scalars else 1):
            scalars = optimizer.next_scalars(group, earlier, *scalars)
        h = optimizer.hyper(group, t, *scalars)
        if not isinstance(h, (tuple, list)):
            raise TypeError(f"hyper() of {rule.__name__} must return a tuple of numbers, got {h!r}")
        return h

    initial = {key: optimizer.initial_value(group, key) for key in found.states}
    return found._replace(averages=(), scalars=()), numbers, initial  # both stand outside the formula


def _random(case: Case, generator: torch.Generator) -> Tensor:
    g = torch.randn(case.size, generator=generator) * case.magnitude
    return torch.where(torch.rand(case.size, generator=generator) < 1 / 8, 0.0, g).to(case.dtype)


def _check_step(probe: _Probe, cases: list[Case], t: int) -> None:
    rule, h = probe.checked, probe.numbers(t)
    params = probe.param_groups[0]["params"]
    before = [
        [
            probe.state[p][key].clone() if probe.state[p] else torch.full_like(p, probe.initial[key])
            for key in rule.states
        ]
        for p in params
    ]
    expected = [_twin(rule, p.grad, states, h) for p, states in zip(params, before)]
    whole = [torch.cat(parts) for parts in zip(*([p.grad, *states] for p, states in zip(params, before)))]
    together = [x.split([case.size for case in cases]) for x in _twin(rule, whole[0], whole[1:], h)]
    try:
        probe.step()
    except Exception as error:
        raise AssertionError(f"the Triton function of {rule.name!r} does not run: {_innermost(error)}") from error
    results = ("u", *(f"the new state {key!r}" for key in rule.states))
    for k, (case, p) in enumerate(zip(cases, params)):
        got = [-p.detach(), *(probe.state[p][key] for key in rule.states)]
        for role, result in enumerate(results):
            where = f"{rule.name!r}, step {t}, {case}: {result}"
            _compare(where, "the Triton function", got[role], "the torch twin", expected[k][role])
            _compare(where, "the twin among other tensors", together[role][k], "the twin alone", expected[k][role])


def _twin(rule: Rule, g: Tensor, states: list[Tensor], h: Numbers) -> list[Tensor]:
    """[u, *new states], the arguments left as they are."""
    g, states = g.clone(), [state.clone() for state in states]
    given, updated = g.clone(), list(states)
    try:
        u = rule.twin(g, updated, h)
    except Exception as error:
        message = f"the torch twin of {rule.name!r} does not run with h={h!r}: {type(error).__name__}: {error}"
        raise AssertionError(message) from error
    promise = f"the torch twin of {rule.name!r} must"
    if not isinstance(u, Tensor) or u.shape != g.shape or u.dtype != g.dtype:
        found = f"{u.dtype} {tuple(u.shape)}" if isinstance(u, Tensor) else type(u).__name__
        raise AssertionError(f"{promise} return u as {g.dtype} {tuple(g.shape)} like g, and returns {found}")
    if not torch.allclose(g, given, rtol=0, atol=0, equal_nan=True):
        raise AssertionError(f"{promise} leave g alone, and writes to it")
    if len(updated) != len(states) or any(a is not b for a, b in zip(updated, states)):
        raise AssertionError(f"{promise} update states in place, and puts others into the list")
    return [u.clone(), *states]


def _compare(where: str, name: str, x: Tensor, reference_name: str, y: Tensor) -> None:
    bound = TOLERANCES[x.dtype] * (y.abs() + y[y.isfinite()].abs().mean())
    equal = (x == y) | (x.isnan() & y.isnan()) | ((x - y).abs() <= bound)
    if not equal.all():
        i = int((~equal).nonzero()[0])
        raise AssertionError(f"{where}[{i}] is {x[i].item()!r} by {name}, {y[i].item()!r} by {reference_name}")


def _innermost(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error
