"""Gradient release: each parameter is updated inside backward, as soon as its gradient is there, which is then freed.

Never more than a few gradients exist at the same time: a model's gradients need no memory of their own. What needs all
of them at once cannot be had with it: their global norm, skipping a step, accumulation, a loss scale.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Iterable, Iterator, MutableMapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from . import means
from .engine import Engine
from .groups import params_of
from .optimizer import FusedOptimizer
from .shards import is_distributed, is_piece
from .torch_step import NotFusable

TOGETHER = ("max_grad_norm", "skip_nonfinite", "track", "flat_grads")
"""Settings that need the gradients of all parameters at once."""


class GradientRelease:
    """What ``enable_gradient_release`` returns: ``remove()`` ends it."""

    def __init__(self, optimizer: FusedOptimizer, hooks: list[Any]):
        self.optimizer = optimizer
        self.hooks = hooks

    def remove(self) -> None:
        """From now on ``optimizer.step()`` updates the parameters again."""
        if not self.hooks:
            return
        for hook in self.hooks:
            hook.remove()
        self.hooks.clear()
        self.optimizer._engine.released = False
        self.optimizer._engine.forget()


def enable_gradient_release(model: torch.nn.Module, optimizer: FusedOptimizer) -> GradientRelease:
    """Let ``loss.backward()`` update each parameter of ``model`` when its gradient is complete, and free the gradient.

    ``optimizer.step()`` and ``zero_grad()`` find nothing left to do and may stay in the training loop; step hooks then
    run around nothing. Schedulers, checkpoints, component-wise clipping and averages work as ever. Not with gradient
    accumulation: every backward pass is a step. Each ``torch.utils.checkpoint`` with ``use_reentrant=True`` is one too:
    a parameter that stands in two of them would take two steps, so give them ``use_reentrant=False``.

    Args:
        model: the module that is called; its parameters are released if the optimizer has them.
        optimizer: one of fusedopt.

    Raises:
        TypeError: for another optimizer.
        ValueError: if the optimizer has none of the model's parameters.
        RuntimeError: for settings that need the gradients together (``TOGETHER``), now or at a later backward pass; for
            DistributedDataParallel, which would average gradients that were used already, and
            FullyShardedDataParallel; if it is enabled already.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"gradient release needs the module that is called, got {type(model).__name__}")
    if not isinstance(optimizer, FusedOptimizer):
        raise TypeError(f"gradient release needs an optimizer of fusedopt, got {type(optimizer).__qualname__}")
    if optimizer._engine.released:
        raise RuntimeError("gradient release is enabled already for this optimizer; call remove() on it first")
    _refuse_settings(optimizer)
    _refuse_wrappers(model)
    _refuse_parts(model.parameters(), optimizer)
    own = set(model.parameters())
    found = [(p, at) for p, at in _listed(optimizer.param_groups) if p in own and p.requires_grad]
    if not found:
        raise ValueError("the optimizer has none of the model's parameters that need gradients")
    params = params_of(optimizer)
    draws = dict(zip(params, accumulate((-(-p.numel() // 8) for p in params), initial=0)))
    singles = [Single(optimizer, p, at, draws[p]) for p, at in found]
    hooks = [single.param.register_post_accumulate_grad_hook(_stepper(optimizer, single)) for single in singles]
    hooks.append(model.register_forward_pre_hook(_refuse_late_wrappers))
    optimizer._engine.released = True
    optimizer._engine.forget()
    optimizer._engine.places.clear()
    return GradientRelease(optimizer, hooks)


def _listed(groups: Sequence[dict[str, Any]]) -> Iterator[tuple[Tensor, tuple[int, int]]]:
    """Every parameter with the number of its group, and its position in that."""
    return ((p, (number, k)) for number, group in enumerate(groups) for k, p in enumerate(group["params"]))


def _stepper(optimizer: FusedOptimizer, single: Single) -> Callable[[Tensor], None]:
    engine = Engine()

    def step(param: Tensor) -> None:
        if not single.param_groups:
            return
        if optimizer._engine.averaged:
            raise RuntimeError(
                "backward() inside `with optimizer.ema_parameters()`, where parameters hold their averages: gradient "
                "release would update these"
            )
        _refuse_settings(optimizer)
        _refuse_parts([param], single)
        try:
            with torch.no_grad():
                engine.step(single)
        except NotFusable as reason:
            raise RuntimeError(f"gradient release cannot be combined with {reason}") from None
        param.grad = None
        optimizer._opt_called = True  # what schedulers ask, to warn of those that are stepped first

    return step


def _refuse_settings(optimizer: FusedOptimizer) -> None:
    names = [name for name in optimizer._settings.active() if name in TOGETHER]
    if names:
        raise RuntimeError(
            f"gradient release updates each parameter before the others' gradients are there, which {', '.join(names)} "
            "would need; leave it out (max_grad_value may stay)"
        )


def _refuse_wrappers(model: torch.nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, DistributedDataParallel):
            raise RuntimeError(
                "gradient release with DistributedDataParallel would update parameters before their gradients are "
                "averaged, and the ranks would drift apart; use fully_shard, or call optimizer.step()"
            )
    if any(map(is_piece, model.parameters())):
        raise RuntimeError(
            "gradient release does not work with FullyShardedDataParallel, which reduces gradients after backward; "
            "use fully_shard (FSDP2), or call optimizer.step()"
        )


def _refuse_parts(params: Iterable[Tensor], optimizer: Any) -> None:
    if any(map(is_distributed, params)) and means.needed(optimizer):
        raise RuntimeError(
            "gradient release updates each parameter as soon as this rank has its gradient, and cautious=True, "
            "StableAdamW and LAMB need means over whole parameters, for which all ranks meet; call optimizer.step()"
        )


def _refuse_late_wrappers(model: torch.nn.Module, arguments: Any) -> None:
    """A model that was wrapped later is called from inside its wrapper."""
    wrapper = DistributedDataParallel._get_active_ddp_module()
    if wrapper is not None:
        _refuse_wrappers(wrapper)
    if any(map(is_piece, model.parameters())):
        _refuse_wrappers(model)


class Single:
    """An optimizer as if it had one parameter only: what an engine asks of one, in the true one's words."""

    step_of_torch = None
    """That would be a step of all parameters."""

    def __init__(self, optimizer: FusedOptimizer, p: Tensor, at: tuple[int, int], first_draw: int):
        self.optimizer = optimizer
        self.param = p
        self._at = at
        self._first_draw = first_draw
        self._view = self._view_of(optimizer.param_groups[at[0]])
        self._states = SingleEntry(lambda: optimizer._states, p)
        self._ema = SingleEntry(lambda: optimizer._ema, p)

    @property
    def param_groups(self) -> list[ChainMap]:
        """A view of the parameter's group, where schedulers write. Loading a checkpoint puts another group there, and
        groups and parameters may be taken out."""
        groups = self.optimizer.param_groups
        if not self._is_there(groups):
            found = [at for p, at in _listed(groups) if p is self.param]
            if not found:
                return []
            self._at = found[0]
        group = groups[self._at[0]]
        if self._view.maps[1] is not group:
            self._view = self._view_of(group)
        return [self._view]

    def _is_there(self, groups: Sequence[dict[str, Any]]) -> bool:
        number, position = self._at
        params = groups[number]["params"] if number < len(groups) else ()
        return position < len(params) and params[position] is self.param

    def _view_of(self, group: dict[str, Any]) -> ChainMap:
        return ChainMap({"params": [self.param]}, group)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.optimizer, name)


class SingleEntry(MutableMapping):
    """One parameter's part of a dict, which may be replaced."""

    def __init__(self, whole: Callable[[], dict[Tensor, Any]], p: Tensor):
        self.whole = whole
        self.param = p

    def __getitem__(self, p: Tensor) -> Any:
        return self.whole()[p]

    def get(self, p: Tensor, default: Any = None) -> Any:
        return self.whole().get(p, default)

    def __setitem__(self, p: Tensor, value: Any) -> None:
        self.whole()[p] = value

    def __delitem__(self, p: Tensor) -> None:
        del self.whole()[p]

    def __iter__(self) -> Iterator[Tensor]:
        return iter([self.param] if self.param in self.whole() else [])

    def __len__(self) -> int:
        return int(self.param in self.whole())
