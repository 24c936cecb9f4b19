"""What an optimizer tells the engine: which formula, which state, which numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from typing import Any, NamedTuple

import torch
from torch import Tensor

Numbers = tuple[float, ...]

WIDE = frozenset((torch.float32, torch.float64))


class Rule(NamedTuple):
    """One update formula, u, states <- rule(g, states, h), as a torch function and a Triton one.

    Shapes: g, u and every state have the parameter's, or are blocks of their elements: a rule treats each element
    alike. Dtypes: all are float32, or float64 for float64 parameters. Errors: ``check_rule`` raises AssertionError
    where the two functions differ. Source: the contract is described in ``kernels/rules.py``.
    """

    name: str
    states: tuple[str, ...]
    """Keys in ``optimizer.state[p]``, in the order in which the formula takes them: torch's own names."""
    twin: Callable[[Tensor, Sequence[Tensor], Numbers], Tensor]
    """``twin(g, state, h) -> u`` in plain torch; updates ``state`` in place, leaves ``g`` alone."""
    fused: Callable[..., None] | None = None
    """torch's fused CPU kernel for the same formula, decay and step included:
    ``fused(params, grads, states, t, group, scale, *scalars)`` for the ``t``-th step; ``scale``, a float32 tensor or
    None, divides the gradients."""
    fused_dtypes: frozenset = WIDE
    """Parameter dtypes in which that kernel is right."""
    fused_narrow: Callable | None = None
    """The same for one block of 16-bit tensors: ``fused_narrow(p, g, states, t, group, scale, *scalars)`` rounds each
    result once, or does nothing and returns NotImplemented where this step does not allow that. Then, and for rules
    without it, ``fused`` gets float32 copies of the blocks if their dtype is not among ``fused_dtypes``."""
    takes_rates: bool = False
    """Whether ``fused`` takes one argument more behind ``scale``, a list of the parameters' learning rates, so that one
    call serves groups that differ in nothing else."""
    takes_sizes: bool = False
    """Whether ``fused`` takes one argument more behind that, for each tensor the numbers of elements of the parameters
    that lie side by side in it, since it takes sums over each. It is not given blocks of tensors then."""
    list_threads: float = 0
    """With up to this many threads one call of ``fused`` serves a whole list of small tensors well. With more,
    torch spends a parallel region on each tensor, and gathering them into one is faster; a kernel that is called
    tensor by tensor (0) always gains by it."""
    lists: Callable[[dict[str, Any]], bool] | None = None
    """``lists(group)``: whether it does so with these options, where not with all."""
    averages: tuple[str, ...] = ()
    """Keys of states that follow the new parameter: a <- a + weight (p - a), after the update and outside the formula.
    The weights are ``Update.averages``."""
    scalars: tuple[str, ...] = ()
    """Keys of numbers that torch keeps beside ``step``, one 0-dim tensor per parameter and key. The optimizer's
    ``next_scalars`` carries them from step to step."""
    kernel: Callable | None = None
    """``kernel(g, state, h) -> (u, new_state)``, the same formula as a Triton function (``fusedopt.custom.jit``): for
    rules outside the package. None: the function of that name in ``kernels/rules.py``."""
    squares: tuple[str, ...] = ()
    """Keys of states that are never negative, such as averages of squares: in 8 bits their roots are stored."""
    exact: tuple[str, ...] = ()
    """Keys of states that stay float32 where others are stored in fewer bits, since the formula breaks with rounded
    ones."""
    uncoded: tuple[str, ...] = ()
    """Keys of states that stay float32 where others have 8 bits: what is less than half a code would be lost for good,
    and these add up little by little. In bfloat16 they are rounded stochastically, hence right in the mean."""

    @property
    def keys(self) -> tuple[str, ...]:
        """Everything of a parameter's shape in ``optimizer.state[p]``."""
        return self.states + self.averages

    def fuses(self, device: torch.device, dtypes: Set[torch.dtype]) -> bool:
        """Whether ``fused`` can update parameters whose tensors have these dtypes."""
        return self.fused is not None and device.type == "cpu" and len(dtypes) == 1 and self.fused_dtypes >= dtypes


SMALLEST = 2.0**-126
"""The smallest normal float32 number."""


def divisible(eps: float) -> float:
    """``eps``, or for 0 a number that vanishes beside the root of any square and leaves 0 / 0 = 0: a parameter whose
    gradient was always zero stays where it is."""
    return float(eps) or SMALLEST


def root_plus_eps(v: Tensor, eps: float, correction: float = 1.0) -> Tensor:
    """sqrt(v_hat) + eps, where sqrt(v_hat) = correction sqrt(v)."""
    root = v.sqrt()
    return (root if correction == 1 else root.mul_(correction)).add_(eps)


def root_of_sum(v: Tensor, eps: float, correction: float = 1.0) -> Tensor:
    """sqrt(v_hat + eps)."""
    return (v.add(eps) if correction == 1 else v.mul(correction**2).add_(eps)).sqrt_()


EVERY_DTYPE = frozenset((torch.float32, torch.float64, torch.bfloat16, torch.float16))
"""The parameter dtypes of kernels that are right in 16 bits too: like torch's fused Adam they compute in float32, and
round each result once."""

FOREVER = torch.tensor(2.0**100, dtype=torch.float32, device="cpu")
"""A step count at which Adam's bias corrections are 1 for every beta below 1."""


def step_tensors(t: int, params: Sequence[Tensor]) -> list[Tensor]:
    """The step count as torch's fused kernels take it: one per parameter, here the same for all."""
    return [torch.full((), float(t), dtype=torch.float32, device="cpu")] * len(params)


class Stage(NamedTuple):
    """One transform around the rule, under the name that it has in ``kernels/stages.py``."""

    name: str
    args: Numbers
    neutral: Numbers | None
    """The arguments with which it changes nothing; None if there are none such."""
    terms: tuple[str, ...] = ()
    """A stage of the update chain may need the means over its tensor of these terms, by their names in
    ``kernels/stages.py``; terms and stage have the same arguments."""


class Update(NamedTuple):
    """One parameter group's numbers for its ``t``-th step."""

    lr: float
    h: Numbers
    on_grad: tuple[Stage, ...]
    on_update: tuple[Stage, ...]
    averages: Numbers = ()
    """One weight for each of the bucket's averages."""
