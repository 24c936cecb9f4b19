"""What an optimizer tells the engine: which formula, which state, which numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Numbers = tuple[float, ...]


class Rule(NamedTuple):
    """One update formula. The package's own have in ``kernels/rules.py`` the same name."""

    name: str
    states: tuple[str, ...]
    """Keys in ``optimizer.state[p]``, in the order in which the formula takes them: torch's own names."""
    twin: Callable[[Tensor, Sequence[Tensor], Numbers], Tensor]
    """``twin(g, state, h) -> u`` in plain torch; updates ``state`` in place, leaves ``g`` alone."""
    fused: Callable[..., None] | None = None
    """torch's fused CPU kernel for the same formula, decay and step included:
    ``fused(params, grads, states, t, group, scale)`` for the ``t``-th step; ``scale``, a float32 tensor or
    None, divides the gradients."""
    fused_dtypes: frozenset = frozenset()
    """Parameter dtypes in which that kernel is right."""
    few: int = 2
    """Fewer small tensors than this are not worth gathering on a CPU. Where one call of a fused kernel serves
    a whole list, gathering pays later than where each tensor takes several calls."""
    single_pass: bool = False
    """Whether one plain operation is all there is: then copying parameters together and back costs more than it
    saves, and they are gathered only where they are flattened or the norm needs their gradients together."""
    averages: tuple[str, ...] = ()
    """Keys of states that follow the new parameter: a <- a + weight (p - a), after the update and outside the formula.
    The weights are ``Update.averages``."""
    kernel: Callable | None = None
    """``kernel(g, state, h) -> (u, new_state)``, the same formula as a Triton function (``fusedopt.custom.jit``): for
    rules outside the package. None: the function of that name in ``kernels/rules.py``."""

    squares: tuple[str, ...] = ()
    """Keys of states that are never negative, such as averages of squares: in 8 bits their roots are stored."""
    exact: tuple[str, ...] = ()
    """Keys of states that stay float32 where others are stored in fewer bits, since the formula breaks with rounded
    ones."""

    @property
    def keys(self) -> tuple[str, ...]:
        """Everything of a parameter's shape in ``optimizer.state[p]``."""
        return self.states + self.averages


def step_tensors(t: int, params: Sequence[Tensor]) -> list[Tensor]:
    """The step count as torch's fused kernels take it: one per parameter, here the same for all."""
    return [torch.tensor(float(t))] * len(params)


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
    averages: Numbers = ()
    """One weight for each of the bucket's averages."""
