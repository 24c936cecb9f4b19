"""The part of gpu.py that lets the host run far ahead of the GPU: was memory overwritten or freed too early?"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from device import bits
from gpu_run import Run
from torch import Tensor

import fusedopt

SHAPES = [(5000,), (64, 40), (33,), (2500,), ()]

SKIPS = {"max_grad_norm": 1.0, "skip_nonfinite": True}

SETTINGS = {
    "clipped": {"max_grad_norm": 1.0},
    "skipped": SKIPS,
    "one launch": SKIPS | {"launches": 1},
    "counted by the device": SKIPS | {"capturable": True},
    "flat": SKIPS | {"flatten": True},
    "flat, zeros left": SKIPS | {"flatten": True, "flat_grads": "zeroed"},
    "all": SKIPS | {"cautious": True, "adaptive_grad_clip": 0.1, "track": "parameters", "ema_decay": 0.9},
    "rounded at random": SKIPS | {"master": "stochastic", "state_dtype": torch.bfloat16},
}


class Way(NamedTuple):
    """How the steps are taken."""

    waits: bool = False
    """For each of them."""
    aside: bool = False
    """On a stream of their own."""
    changing: bool = False
    """With gradients for other parameters than the step before."""


WAYS = {
    "ahead": Way(),
    "ahead, on a stream of its own": Way(aside=True),
    "ahead, other gradients at every step": Way(changing=True),
}
AHEAD = 40
"""Steps: more than skips.Skips.FURTHEST."""


def races(run: Run) -> None:
    """Steps that are queued while the GPU sleeps end at the same bits as steps of which each is waited for."""
    for label, settings in itertools.islice(SETTINGS.items(), 1 if run.dry else None):
        for name, way in WAYS.items():
            if way.changing and "flat_grads" in settings:
                continue  # there every parameter has a gradient at every step
            expected, found = (_walk(run, settings, each) for each in (Way(waits=True, changing=way.changing), way))
            pairs = list(zip(found, expected, strict=True))
            differ = sum((bits(a) != bits(b)).sum().item() for a, b in pairs)
            finite = all(x.isfinite().all() for x in expected)
            note = f"{differ} of {sum(a.numel() for a, _ in pairs)} values differ, finite: {finite}"
            run.result("races", f"{label}, {name}", "failed" if differ or not finite else "ok", note)


def _walk(run: Run, settings: dict[str, Any], way: Way) -> list[Tensor]:
    """Parameters and states behind some steps, whose learning rate changes and of which some are skipped."""
    generator = torch.Generator(run.on.name).manual_seed(0)
    dtype = torch.bfloat16 if "master" in settings else torch.float32
    shapes = SHAPES[:3] if settings.get("launches") == 1 else SHAPES

    def random() -> list[Tensor]:
        return [torch.randn(shape, generator=generator, device=run.on.name).to(dtype) for shape in shapes]

    params, gradients = list(map(torch.nn.Parameter, random())), [random() for _ in range(3)]
    gradients.append([torch.full_like(g, float("inf")) for g in gradients[0]])
    more = {"backend": run.backend} if run.backend else {}
    optimizer = fusedopt.AdamW([{"params": params[:2]}, {"params": params[2:]}], **settings, **more)
    optimizer.zero_grad()
    for number in range(4 if run.dry else 3 * AHEAD):
        if not way.waits and number % AHEAD == 5:
            run.on.delay(0.1)
        bad = number % 7 == 3 and optimizer.skip_nonfinite
        for k, (p, g) in enumerate(zip(params, gradients[3 if bad else number % 3])):
            if optimizer.flat_grads:
                p.grad.add_(g)
            else:
                p.grad = None if way.changing and (number + k) % 3 == 0 else g.clone()
        for k, group in enumerate(optimizer.param_groups):
            group["lr"] = 0.01 * (1 + number % 5 + k)
        _aside(run, optimizer.step) if way.aside else optimizer.step()
        if way.waits:
            run.on.settle()
    run.on.settle()
    states = [x for state in optimizer.state_dict(compact=True)["state"].values() for x in state.values()]
    averages = list(optimizer.ema_parameters()) if "ema_decay" in settings else []
    return [x.detach().to(run.on.name) for x in (*params, *states, *averages)]


def _aside(run: Run, step: Callable[[], None]) -> None:
    """On a stream of its own, before which what this one allocates takes any memory that was freed too early."""

    def late() -> None:
        run.on.delay(0.002)
        step()

    run.on.alongside(late, in_order=True)
    for size in (64, 512, 4096, 32768):
        torch.full((size,), float("nan"), device=run.on.name)
    run.on.join()
