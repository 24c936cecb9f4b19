"""One case: the tensors, the step of each implementation on them, and whether it does what torch does."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from rivals import CLIPS, IMPLEMENTATIONS, Missing
from shapes import Groups, cut
from torch import Tensor
from variants import LR, VARIANTS, Variant

import fusedopt


class Falling:
    """A limit for the norm that binds at every step of everybody, although all share the gradients and some write to
    them: each time that it is taken it lies 0.4 % lower, more than torch's float32 norm is off. (A fixed limit binds
    once; then there is nothing to multiply.) Before the squares of the gradients leave the normal numbers, with which
    processors are fast, ``restore`` brings both back."""

    def __init__(self, grads: list[list[Tensor]]):
        self.grads = [g for group in grads for g in group]
        self.highest = self.value = _norm(self.grads)

    def __next__(self) -> float:
        self.value *= 1 - 2**-8
        return self.value

    def restore(self) -> None:
        """To be called between the rounds that are timed."""
        torch._foreach_mul_(self.grads, self.highest / self.value)
        self.value = self.highest


SCALES = 1.0, 4.0, 0.01, 0.01
"""Of the gradients of a check's steps. Up, so that clipping changes Adam's direction, whatever its size; and down, so
that amsgrad's maximum differs from the average."""


class Case(NamedTuple):
    model: str
    variant: str
    clip: bool = False
    amp: bool = False
    dtype: str = "float32"

    def __str__(self) -> str:
        marks = [self.dtype, *(["clip"] if self.clip else []), *(["amp"] if self.amp else [])]
        return f"{self.model} {self.variant} {' '.join(marks)}"


class Unequal(Exception):
    """An implementation does not do what torch does, within what it promises."""


class Problem:
    """Initial parameters and gradients of a case, shared by all implementations."""

    def __init__(self, case: Case, groups: Groups, device: str, backend: str | None = None):
        self.case, self.device = case, device
        self.variant: Variant = VARIANTS[case.variant]
        self.settings: dict[str, Any] = {} if backend is None else {"backend": backend}
        generator = torch.Generator(device).manual_seed(0)
        dtype = getattr(torch, case.dtype)

        def random(scale: float) -> list[list[Tensor]]:
            return [
                [(torch.randn(shape, generator=generator, device=device) * scale).to(dtype) for shape in group]
                for group in groups
            ]

        self.initial, self.grads = random(0.1), random(1e-3)
        self.limit = Falling(self.grads)

    def parameters(self) -> list[dict[str, Any]]:
        """Groups of new parameters with the shared gradients, each group with a learning rate of its own."""
        made = []
        for number, (values, grads) in enumerate(zip(self.initial, self.grads)):
            params = [torch.nn.Parameter(value.clone()) for value in values]
            for p, g in zip(params, grads):
                p.grad = g
            made.append({"params": params, "lr": LR * (1 + number / len(self.initial))})
        return made

    def made(
        self, name: str, groups: list[dict[str, Any]], limit: float | None = None
    ) -> tuple[Any, Callable[[], None]]:
        """An optimizer, and one training step's share of it: unscaling, clipping, ``step()``. Without a limit for the
        norm it falls from step to step."""
        clips_inside = name in CLIPS
        limits = self.limit if limit is None else itertools.repeat(limit)
        clipping = {"max_grad_norm": next(limits)} if self.case.clip else {}
        inside = self.settings | clipping if clips_inside else {}
        try:
            optimizer = IMPLEMENTATIONS[name].make(self.variant, groups, inside)
        except (RuntimeError, ValueError) as problem:
            raise Missing(f"{type(problem).__name__}: {problem}") from problem
        update = optimizer.step
        if name == "compiled":
            torch.compiler.reset()  # or it would compile for any shapes, having seen others
            update = torch.compile(update)
        params = [p for group in groups for p in group["params"]]
        clip_before = self.case.clip and not clips_inside
        if self.case.clip and clips_inside:
            update = _limited(optimizer, limits)
        if not self.case.amp:
            return optimizer, (lambda: _clip_then(params, next(limits), update)) if clip_before else update
        return optimizer, self._scaled(optimizer, update, params, limits if clip_before else None, clips_inside)

    def _scaled(
        self, optimizer: Any, update: Callable, params: list[Tensor], limits: Iterator[float] | None, ours: bool
    ) -> Callable[[], None]:
        """With a GradScaler whose scale is 1, so that unscaling the shared gradients again leaves them as they are."""
        scalers = getattr(fusedopt, "GradScaler", None) if ours else None
        device = torch.device(self.device).type
        scaler = (scalers or torch.amp.GradScaler)(device, init_scale=1.0, growth_interval=2**31 - 1)
        scaler.scale(torch.ones((), device=self.device))

        def step() -> None:
            if limits is not None:
                scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(params, next(limits))
            scaler.step(optimizer)
            scaler.update()

        return step

    def bytes_needed(self, optimizer: Any) -> int:
        """What one step must move: gradients read, parameters and states read and written, gradients once more for
        the norm. The least that any implementation of these states can do."""
        values = [p for group in optimizer.param_groups for p in group["params"]]
        states = [
            x for p in values for x in optimizer.state[p].values() if isinstance(x, Tensor) and x.numel() == p.numel()
        ]
        reads = 2 if self.case.clip or self.case.amp else 1
        return sum(2 * x.nbytes for x in (*values, *states)) + reads * sum(p.grad.nbytes for p in values)


def _limited(optimizer: Any, limits: Iterator[float]) -> Callable[[], None]:
    """The step, each with its own limit, which is put where it belongs without the checks of an assignment: other
    implementations get theirs without any."""
    settings, step = vars(optimizer._settings), optimizer.step

    def limited() -> None:
        settings["max_grad_norm"] = next(limits)
        settings.pop("clip", None)  # what was derived from it
        step()

    return limited


def _clip_then(params: list[Tensor], limit: float, update: Callable[[], Any]) -> None:
    torch.nn.utils.clip_grad_norm_(params, limit)
    update()


def check(case: Case, groups: Groups, device: str, name: str, backend: str | None = None) -> float:
    """How far an implementation ends from where torch does after a few steps, as a part of the way.

    The oracle is torch's for-loop in float64; for an optimizer that torch lacks, ours in plain torch in float64, which
    the tests hold to its paper.

    Raises:
        Unequal: if that is more than the implementation promises.
        Missing: if it cannot run here.
    """
    small = tuple(map(tuple, cut(groups, 5000)))
    way, expected, limit = _oracle(case._replace(amp=False), small, device)
    problem = _far(Problem(case, small, device, backend))
    ended = _walk(problem, name, limit)
    apart = _norm(a - b for a, b in zip(ended, expected)) / way
    promise = IMPLEMENTATIONS[name].promise + (0.1 if problem.initial[0][0].element_size() < 4 else 0.0)
    if not apart <= promise:
        raise Unequal(f"after {len(SCALES)} steps it is off by {apart:.2%} of the way, and promises {promise:.2%}")
    return apart


@functools.lru_cache(maxsize=2)
def _oracle(case: Case, groups: Groups, device: str) -> tuple[float, list[Tensor], float]:
    """How long the way is, where it ends, and a limit for the norm that binds at some steps."""
    problem = _far(Problem(case, groups, device))
    exact = Problem(case._replace(dtype="float64"), groups, device, "torch")
    exact.initial, exact.grads = (
        [[x.to(torch.float64) for x in group] for group in tensors] for tensors in (problem.initial, problem.grads)
    )
    limit = 0.7 * _norm(g for group in exact.grads for g in group)
    ended = _walk(exact, "forloop" if hasattr(torch.optim, problem.variant.name) else "fusedopt", limit)
    start = [x for group in exact.initial for x in group]
    return _norm(a - b for a, b in zip(start, ended)), ended, limit


def _far(problem: Problem) -> Problem:
    """With gradients about as large as what they are gradients of."""
    for g in (g for group in problem.grads for g in group):
        g.mul_(1000)
    return problem


def _walk(problem: Problem, name: str, limit: float) -> list[Tensor]:
    """Where a few large steps lead, in float64."""
    groups = problem.parameters()
    for group in groups:
        group["lr"] = group["lr"] * 1000  # out of the rounding of the parameters
    _, step = problem.made(name, groups, limit)
    params = [p for group in groups for p in group["params"]]
    for scale in SCALES:
        for p, g in zip(params, (g for group in problem.grads for g in group)):
            p.grad = g * scale
        step()
    return [p.detach().to(torch.float64) for p in params]


def _norm(tensors: Iterable[Tensor]) -> float:
    return sum(x.square().sum().item() for x in tensors) ** 0.5
