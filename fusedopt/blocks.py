"""The fallback's loop over one group, for rules that read their tensors several times: block by block, in memory that
stays in the cache."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

BLOCK = 1 << 18
"""Elements whose parameter, gradient, states and copies fit the last cache; smaller blocks cost more calls."""


def is_plain(group: dict[str, Any], scale: Tensor | None) -> bool:
    """Whether the gradient goes into the rule as it is."""
    return scale is None and group["weight_decay"] == 0 and not group["maximize"]


def blocks(
    group: dict[str, Any], scale: Tensor | None, params: Sequence[Tensor], grads: Sequence[Tensor], *states: list
) -> Iterator[tuple[Tensor, ...]]:
    """Block by block in the order of memory: the parameter, the gradient with all that comes before the rule, the
    states. The engine hands over tensors of equal, dense strides. Gradients are clipped where they are, as torch's
    fused kernels do; what else comes before the rule goes into a copy."""
    weight_decay = float(group["weight_decay"])
    factor = (-1 if group["maximize"] else 1) / (1 if scale is None else scale.item())
    copy = None if is_plain(group, None) else scratch("gradient", params)
    for tensors in zip(params, grads, *states):
        size = tensors[0].numel()
        parts = zip(*(x.as_strided((size,), (1,)).split(BLOCK) for x in tensors)) if size > BLOCK else (tensors,)
        for p, g, *state in parts:
            if copy is not None:
                g = torch.mul(g, factor, out=like(copy, p))
                if weight_decay != 0:
                    g.add_(p, alpha=weight_decay)
            elif factor != 1:
                g.mul_(factor)
            yield p, g, *state


def like(memory: Tensor, p: Tensor) -> Tensor:
    """The beginning of scratch memory, laid out as a block."""
    return memory.as_strided(p.size(), p.stride())


class _Scratch(threading.local):
    """Memory for one block, kept from step to step: fresh memory costs as much in page faults as the arithmetic."""

    def __init__(self):
        self.buffers = {}

    def __call__(self, role: str, params: Sequence[Tensor]) -> Tensor:
        """At least as long as the longest block of these parameters; the longest that there ever was, else."""
        size, key = min(BLOCK, max(map(Tensor.numel, params))), (role, params[0].dtype)
        buffer = self.buffers.get(key)
        if buffer is None or buffer.numel() < size:
            # Memory made in inference mode could not be written to outside it.
            with torch.inference_mode(False):
                buffer = self.buffers[key] = torch.zeros(size, dtype=params[0].dtype, device="cpu")
        return buffer


scratch = _Scratch()
