"""Exponential moving averages of the parameters, kept by the pass that updates them.

    a <- a + (1 - ema_decay) (p - a)        with the new p

An average begins as its parameter before the first step, moves at every step at which the parameter is updated, and
is float32 where the parameter has 16 bits, in which it would stand still. It follows what these are rounded from,
except where torch's fused kernels round plain 16-bit parameters first. A first step with a learning rate of 0 leaves it
alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from .forms import wide
from .groups import params_of
from .shards import gather_anew, is_piece, kind, local, on_one_mesh

ROLE = "ema"
"""The averages' key in the parameters' places. It is no key of ``optimizer.state``, where torch has none."""


def adopt(
    averages: dict[Tensor, Tensor], p: Tensor, place: Any
) -> tuple[list[tuple[Tensor, Tensor]], dict[Tensor, Tensor]]:
    """Let ``averages[p]`` be a view of the place. Returns what has to be written into it, and the view."""
    value = averages.get(p)
    if place.holds(ROLE, value):
        return [], {}
    view = place.open(ROLE, wide(p.dtype))
    return [(local(view), local(p).detach() if value is None else local(value))], {p: view}


def stand_still(optimizer: Any) -> bool:
    """Whether averages are kept, and the host knows all learning rates to be 0."""
    if optimizer.ema_decay is None:
        return False
    rates = [group.get("lr") for group in optimizer.param_groups]
    return all(rate is not None and not (isinstance(rate, Tensor) and rate.is_cuda) and rate == 0 for rate in rates)


class EmaParameters(list):
    """The averages in the order of the parameters; where there is none yet, the parameter itself.

    As a context manager it puts them into the parameters, for evaluation, and back again what was there::

        with optimizer.ema_parameters():
            evaluate(model)
    """

    def __init__(self, optimizer: Any):
        averages = optimizer._ema
        if not averages and optimizer.ema_decay is None:
            raise RuntimeError("no averages are kept: make the optimizer with ema_decay=0.999, say, or set it")
        self.optimizer = optimizer
        self.trained: list[tuple[Tensor, Tensor]] = []
        """What was in the parameters, as long as they hold the averages."""
        params = params_of(optimizer)
        super().__init__(averages.get(p, p if is_lazy(p) else p.detach()) for p in params)

    def __enter__(self) -> EmaParameters:
        engine = self.optimizer._engine
        if engine.averaged:
            raise RuntimeError("the parameters are their averages already: leave the other `with` first")
        averages = self.optimizer._ema
        if any(map(is_piece, averages)):
            raise RuntimeError(
                "the averages cannot be put into the pieces of FullyShardedDataParallel's flat parameters and back: it "
                "may go on with weights that an earlier forward pass has gathered; use fully_shard (FSDP2)"
            )
        try:
            with torch.no_grad():
                self.trained = [(p, p.clone()) for p in averages]
                engine.averaged = True
                for p, average in averages.items():
                    p.copy_(average)
            gather_anew(averages)
        except BaseException:  # without a body to leave nobody would put them back
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception: Any) -> None:
        try:
            self._put_back()
        except BaseException:  # an interrupt on the way, after which nobody has what was trained
            self._put_back()
            raise

    def _put_back(self) -> None:
        with torch.no_grad():
            for p, value in self.trained:
                p.copy_(value)
        gather_anew(p for p, _ in self.trained)
        self.optimizer._engine.averaged = False
        self.trained = []


def state_dict(optimizer: Any) -> dict[int, Tensor]:
    """The averages by the numbers that parameters have in ``optimizer.state_dict()``."""
    params = params_of(optimizer)
    begun = {k: optimizer._ema[p] for k, p in enumerate(params) if p in optimizer._ema}
    if optimizer.ema_decay is None:
        return begun
    # So that there is something to load into before the first step.
    others = {k: p for k, p in enumerate(params) if k not in begun and p.requires_grad and not is_lazy(p)}
    return begun | {k: p.detach().to(wide(p.dtype), copy=True) for k, p in others.items()}


@torch.no_grad()
def load(optimizer: Any, averages: Mapping[int, Tensor]) -> None:
    params = params_of(optimizer)
    if not isinstance(averages, Mapping):
        raise TypeError(f"averages are a dict, as ema_state_dict() returns it; got {type(averages).__name__}")
    for k, value in averages.items():
        if not isinstance(k, int) or not 0 <= k < len(params):
            raise ValueError(f"an average for parameter {k!r} was loaded, but there are {len(params)} parameters")
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.shape != params[k].shape:
            got = f"{value.dtype} of {tuple(value.shape)}" if isinstance(value, Tensor) else f"{value!r}"
            raise ValueError(
                f"the average of parameter {k} must be a floating-point tensor of shape {tuple(params[k].shape)}, got "
                f"{got}"
            )
        if not on_one_mesh(value, params[k]):
            raise ValueError(f"the average of parameter {k} is a {kind(value)}, the parameter a {kind(params[k])}")
    loaded = {
        params[k]: torch.empty_like(params[k], dtype=wide(params[k].dtype)).copy_(value.detach())
        for k, value in averages.items()
    }
    optimizer._ema.clear()
    optimizer._ema.update(loaded)
