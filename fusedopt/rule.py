"""What an optimizer tells the engine: which formula, which state, which numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

Numbers = tuple[float, ...]


class Rule(NamedTuple):
    """One update formula, under the name that it has in ``kernels/rules.py``."""

    name: str
    states: tuple[str, ...]
    """Keys in ``optimizer.state[p]``, in the order in which the formula takes them: torch's own names."""
    twin: Callable[[Tensor, Sequence[Tensor], Numbers], Tensor]
    """``twin(g, state, h) -> u`` in plain torch; updates ``state`` in place, leaves ``g`` alone."""
    fused: Callable[..., None] | None = None
    """torch's fused CPU kernel for the same formula, decay and step included:
    ``fused(params, grads, states, steps, group, scale)``; with ``scale`` it divides the gradients by it."""
    fused_dtypes: frozenset = frozenset()
    """Parameter dtypes in which that kernel is right."""


class Stage(NamedTuple):
    """One transform around the rule, under the name that it has in ``kernels/stages.py``."""

    name: str
    args: Numbers
    neutral: Numbers
    """The arguments with which it changes nothing."""


class Update(NamedTuple):
    """One parameter group's numbers for its ``t``-th step."""

    lr: float
    h: Numbers
    on_grad: tuple[Stage, ...]
    on_update: tuple[Stage, ...]
