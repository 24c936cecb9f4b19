"""The fallback's loop over one group, for rules that read their tensors several times: block by block, in memory that
stays in the cache."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from itertools import repeat
from typing import Any

import torch
from torch import Tensor

WHOLE = 1 << 20
"""Elements of a tensor that is left whole, since it may lie in the last cache from the step before."""

LAST_CACHE = 1 << 18, WHOLE
"""Elements per block, so that its parameter, gradient, states and copies fit the last cache (smaller blocks would cost
more calls); and elements of a tensor that is left whole."""

SECOND_CACHE = 1 << 17, 1 << 18
"""The same for formulas that pass over a block many times."""

GRAIN = 1 << 15
"""Elements that torch gives a thread at least (at::internal::GRAIN_SIZE): a block of fewer leaves threads idle, each of
which has a cache of its own."""


def for_threads(block: int) -> int:
    """Elements per block, if ``block`` is what suits few threads."""
    return max(block, GRAIN * torch.get_num_threads())


def is_plain(group: dict[str, Any], scale: Tensor | None) -> bool:
    """Whether the gradient goes into the rule as it is."""
    return scale is None and group["weight_decay"] == 0 and not group["maximize"]


def parted_decay(group: dict[str, Any]) -> tuple[float, dict[str, Any]]:
    """The decay of the step, and the group with that of the gradient, for classes whose decay is decoupled, or may be:
    then they have ``decoupled_weight_decay``."""
    if not group.get("decoupled_weight_decay", True):
        return 0.0, group
    return float(group["weight_decay"]), {**group, "weight_decay": 0.0}


def blocks(
    group: dict[str, Any],
    scale: Tensor | None,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    *states: list,
    rates: Sequence[float] | None = None,
    sizes: tuple[int, int] = LAST_CACHE,
) -> Iterator[tuple]:
    """Block by block in the order of memory: the parameter, the gradient with all that comes before the rule, the
    states, and the parameter's learning rate where ``rates`` are given. The engine hands over tensors of equal, dense
    strides; those of more elements than ``sizes`` says are cut. Gradients are clipped where they are, as torch's fused
    kernels do; what else comes before the rule goes into a copy."""
    weight_decay = float(group["weight_decay"])
    factor = (-1 if group["maximize"] else 1) / (1 if scale is None else scale.item())
    copies = not is_plain(group, None)
    block, whole = for_threads(sizes[0]), sizes[1]
    largest = max(block, whole)
    for tensors, rate in zip(zip(params, grads, *states), repeat(()) if rates is None else zip(rates)):
        size = tensors[0].numel()
        parts = zip(*(x.as_strided((size,), (1,)).split(block) for x in tensors)) if size > largest else (tensors,)
        for p, g, *state in parts:
            if copies:
                g = torch.mul(g, factor, out=scratch("gradient", p))
                if weight_decay != 0:
                    g.add_(p, alpha=weight_decay)
            elif factor != 1:
                g.mul_(factor)
            yield p, g, *state, *rate


class _Scratch(threading.local):
    """Memory for one block, kept from step to step: fresh memory costs as much in page faults as the arithmetic."""

    def __init__(self):
        self.buffers: dict[tuple, Tensor] = {}
        self.views: dict[tuple, Tensor] = {}

    def __call__(self, role: str, p: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Memory laid out as a block, of its dtype if no other is asked for. Zeros, until somebody writes there."""
        key = role, dtype or p.dtype, p.size(), p.stride()
        found = self.views.get(key)
        return self._view(key, p) if found is None else found

    def _view(self, key: tuple, p: Tensor) -> Tensor:
        buffer = self.buffers.get(key[:2])
        if buffer is None or buffer.numel() < p.numel():
            # Memory made in inference mode could not be written to outside it.
            with torch.inference_mode(False):
                buffer = self.buffers[key[:2]] = torch.zeros(p.numel(), dtype=key[1], device="cpu")
            self.views = {other: view for other, view in self.views.items() if other[:2] != key[:2]}
        with torch.inference_mode(False):
            view = self.views[key] = buffer.as_strided(p.size(), p.stride())
        return view


scratch = _Scratch()
