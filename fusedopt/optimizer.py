"""The torch.optim protocol around a rule.

``FusedOptimizer`` stands in front of a torch.optim class and replaces its ``step``; arguments, their
validation, parameter groups, hooks and checkpoints stay torch's own.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from . import checkpoints, conversion, ema, flat_grads, introspection, refresh, storage
from .arguments import check_group
from .ema import EmaParameters
from .engine import Engine
from .flat_grads import FlatGrads
from .formula import Formula
from .groups import params_of
from .hooks import is_profiling, profile_hook_step
from .metrics import Metrics
from .settings import SettingAttributes
from .torch_step import NotFusable, TorchStep

registry: dict[str, type[FusedOptimizer]] = {}
"""Every optimizer by name. Tests and benchmarks take their cases from here."""


class FusedOptimizer(Formula, SettingAttributes, TorchStep, torch.optim.Optimizer):
    """Base of the optimizers.

        g <- clip, negate, decay (g)      u, states <- rule(g, states, h)      p <- p - lr decay (u)

    A subclass names its rule and computes the group's numbers: ``rule(group)``, ``hyper(group, t)`` and, where they
    differ from the defaults, ``lr``, ``decoupled`` or ``decays``, ``initial_value``; for a rule with averages
    ``averages``, for one with scalars ``next_scalars``. What gets ``t`` gets the rule's scalars after it.

    Shapes: gradients and states have their parameter's, which may be any, with any strides. Dtypes: parameters are
    float64, float32, bfloat16 or float16; arithmetic is float32, in float64 for float64. Errors: torch's own where
    torch raises, else ValueError, TypeError or RuntimeError, before anything is changed. Source: the protocol of
    torch.optim 2.13."""

    def __init_subclass__(cls, register: bool | None = None, **kwargs: Any) -> None:
        """``register``: whether the class is entered in ``fusedopt.registry``; by default the package's own are."""
        super().__init_subclass__(**kwargs)
        introspection.add_attributes(cls)
        cls.__signature__ = introspection.signature(cls, FusedOptimizer)
        ours = cls.__module__.startswith("fusedopt.")
        if register or (ours and register is None):
            registry[cls.__name__] = cls
        if ours:
            introspection.add_documentation(cls)
            introspection.add_constructor(cls)

    def __init__(self, params: Any, *args: Any, **kwargs: Any) -> None:
        names = self.settings_class.fields()
        self._settings = self.settings_class(**{name: kwargs.pop(name) for name in names if name in kwargs})
        self._engine = Engine()
        self._ema: dict[Tensor, Tensor] = {}
        self._flat_grads = FlatGrads()
        self._kernel_failures: dict[torch.device, str] = {}
        super().__init__(params, *args, **kwargs)
        self._check_settings()

    def _check_settings(self) -> None:
        """Raise ValueError or RuntimeError where options or parameters contradict the settings."""
        rules = [self.rule(group) for group in self.param_groups]
        storage.check(self._settings, params_of(self))
        if self.state_dtype is not None and rules and not any(rule.keys for rule in rules):
            raise ValueError(
                f"state_dtype={self.state_dtype!r}: {type(self).__name__} with these options has no states"
            )
        if self.flat_grads:
            flat_grads.check(self)

    # The protocol

    @property
    def state(self) -> defaultdict[Tensor, dict[str, Any]]:
        """What torch's ``state`` is. Whoever asks for it may move states elsewhere, to the host say, to make room on a
        GPU until the next step: what a plan holds of them is let go, and taken back by the next step if it is there."""
        self._engine.lend()
        return self._states

    @state.setter
    def state(self, state: defaultdict[Tensor, dict[str, Any]]) -> None:
        self.__dict__["state"] = state  # where torch's __setstate__ puts it

    @property
    def _states(self) -> defaultdict[Tensor, dict[str, Any]]:
        """The same for ourselves, who move nothing."""
        return self.__dict__["state"]

    profile_hook_step = staticmethod(profile_hook_step)

    def step(self, closure: Any = None) -> Any:
        """Perform one optimization step.

        Args:
            closure: reevaluates the model and returns the loss, which is returned.

        Raises:
            RuntimeError: before anything is changed, for gradients or states that do not fit their
                parameters, and for settings that these parameters cannot honour.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        reason = None
        # What torch.no_grad() does, without the microsecond that its object costs.
        grad_mode = torch.is_grad_enabled()
        try:
            torch._C._set_grad_enabled(False)
            (self._flat_grads if self._settings.flat_grads == "zeroed" else self._engine).step(self)
        except NotFusable as error:
            reason = error
        finally:
            torch._C._set_grad_enabled(grad_mode)
        if reason is not None:
            self._torch_step(reason)
        return loss

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's. ValueError or TypeError, and no group more, for options that are no numbers, that contradict the
        settings, or that are settings of the whole optimizer."""
        if isinstance(param_group, dict):
            check_group(self, param_group)
        super().add_param_group(param_group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state_dict of this class or of torch's.

        Raises:
            KeyError, TypeError, ValueError: for what does not fit, before anything is changed; the message names
                the entry.
        """
        checkpoints.load(self, state_dict, super().load_state_dict)

    def state_dict(self, *, compact: bool = False) -> dict[str, Any]:
        """The optimizer's state as torch's ``state_dict`` has it, for loading into this class, with whatever settings,
        or into torch's.

        Args:
            compact: keep 16- and 8-bit states, and what ``master`` keeps beside parameters, as they are stored:
                smaller, exact to the last bit, and for fusedopt alone. Elements of 8 bits share scales in the order of
                memory, so keep their strides: a ``.contiguous()`` on the way, of filters in ``channels_last`` say,
                gives them the scales of others. Otherwise states are shown in float32, as new tensors; the exact
                values of 16-bit parameters as "master".

        Raises:
            RuntimeError: for ``compact`` and 8-bit states of distributed parameters.
        """
        self._engine.synchronize(self)
        return conversion.state_dict(self, compact, super().state_dict)

    def master_state_dict(self) -> dict[int | str, Tensor]:
        """The exact parameters: copies in float32 (float64 where the parameter is), by the names that the optimizer was
        given (``named_parameters()``), else by number. With ``master="split"`` or ``"fp32"`` they are what a float32
        training would have; without a master form, the parameters themselves."""
        self._engine.synchronize(self)
        return conversion.master_state_dict(self)

    def load_master_state_dict(self, masters: Mapping[int | str, Tensor]) -> None:
        """Set parameters, and what ``master`` keeps beside them, from what ``master_state_dict`` gave, or from any
        float32 weights under the same keys. TypeError or ValueError, and no change, if they do not fit."""
        self._engine.synchronize(self)
        conversion.load_master_state_dict(self, masters)

    def __getstate__(self) -> dict[str, Any]:
        self._engine.synchronize(self)
        return {**super().__getstate__(), "_settings": self._settings, "_ema": self._ema}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A pickle of torch's class, or of an older version, has no settings.
        self.__dict__.setdefault("_settings", self.settings_class())
        self.__dict__.setdefault("_engine", Engine())
        self.__dict__.setdefault("_ema", {})
        self.__dict__.setdefault("_flat_grads", FlatGrads())
        self.__dict__.setdefault("_kernel_failures", {})
        if self._engine.lent:
            self._engine.take_back(self)  # loaded states take the memory of those before, which must live until then
        self._engine.synchronize(self)
        self._engine.forget()
        conversion.release(state.get("state", {}))
        super().__setstate__(state)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch's; with ``flat_grads`` gradients become zeros, whatever ``set_to_none`` says, unless a step has left
        them so."""
        self._engine.deferred = None
        if self.flat_grads:
            self._flat_grads.zero(self)
        elif torch.compiler.is_compiling() or not set_to_none or is_profiling():
            super().zero_grad(set_to_none)
        else:
            # What torch does there, without the name in profiles that costs twice as much.
            for group in self.param_groups:
                for p in group["params"]:
                    if p.grad is not None:
                        p.grad = None

    # What fusedopt adds

    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False) -> Tensor:
        """Clip the norm over the gradients of all groups, as torch.nn.utils.clip_grad_norm_ does, but without writing
        to them: the next ``step`` multiplies them on its way. Nobody may change them in between.

        Args:
            max_norm: the largest norm, g <- g min(1, max_norm / (norm + 1e-6)).
            norm_type: other norms than 2 are left to torch, which clips at once.
            error_if_nonfinite: raise RuntimeError for a norm that is inf or NaN. On a GPU this waits for it.

        Returns:
            The norm before clipping, a 0-dim tensor.

        Raises:
            ValueError: for a ``max_norm`` that is negative or NaN.
            RuntimeError: under gradient release; if ``max_grad_norm`` is set as well; and, for ``norm_type`` 2, for a
                second call before ``step``.
        """
        max_norm, norm_type = float(max_norm), float(norm_type)
        if not max_norm >= 0:
            raise ValueError(f"Invalid max_norm: {max_norm}; give a number that is not negative")
        if self._engine.released:
            raise RuntimeError(
                "clip_grad_norm_() needs all gradients together, and gradient release frees each at once"
            )
        if self.max_grad_norm is not None:
            raise RuntimeError(
                f"the step clips to max_grad_norm={self.max_grad_norm} by itself: leave clip_grad_norm_() out, or set "
                "optimizer.max_grad_norm = None"
            )
        try:
            if norm_type != 2:
                raise NotFusable(f"norm_type={norm_type}")
            with torch.no_grad():
                norm = self._engine.clip(self, max_norm)
        except NotFusable:
            if self._engine.scaling is not None:
                self._engine.scaling.unscale()
            params = params_of(self)
            return torch.nn.utils.clip_grad_norm_(params, max_norm, norm_type, error_if_nonfinite)
        if error_if_nonfinite and not torch.isfinite(norm):
            self._engine.deferred = None
            raise RuntimeError(
                f"The total norm of order {norm_type} for gradients from the optimizer's parameters is non-finite "
                f"({float(norm)}), so it cannot be clipped; leave error_if_nonfinite out to scale by it anyway"
            )
        return norm

    def refresh(self) -> None:
        """Tell the CUDA graphs that hold steps of this optimizer what its options are now. Tensors on the GPU, as a
        learning rate may be, are read by every replay; numbers are as they were at the capture until this is called.
        Waits for the GPU. Without graphs nothing is frozen, and nothing happens.

        Raises:
            RuntimeError: before anything is changed, where a graph holds more of an option than numbers: with
                ``capturable=True`` what bias corrections are made of, a formula, a clip norm. Capture again then:
                graphs before the latest are left as they are where that is so, with a warning.
        """
        refresh.refresh(self, self._engine.captured)

    def ema_parameters(self) -> EmaParameters:
        """The parameters' moving averages, if ``ema_decay`` is set: a list of tensors that later steps move on, and
        a context manager within which the parameters are their averages. RuntimeError if there are none."""
        return EmaParameters(self)

    def ema_state_dict(self) -> dict[int, Tensor]:
        """The averages by the numbers of the parameters, for ``load_ema_state_dict``. They are no part of
        ``state_dict``, which goes to torch's optimizers too."""
        return ema.state_dict(self)

    def load_ema_state_dict(self, averages: Mapping[int, Tensor]) -> None:
        """Take over what ``ema_state_dict`` gave. TypeError or ValueError, and no change, if it does not fit."""
        ema.load(self, averages)

    @property
    def grad_norm(self) -> Tensor | Any:  # Any stands for None, which else every use would have to rule out
        """The global gradient norm of the latest step, before clipping: a 0-dim tensor on the gradients'
        device, a new one at each access. None before the first step and where no setting needs it."""
        return self._engine.grad_norm()

    @property
    def metrics(self) -> Metrics | Any:
        """The norms of gradient, update and parameter of the latest step: see ``fusedopt.metrics.Metrics``. None before
        the first step. AttributeError where ``track`` is None."""
        if self.track is None:
            raise AttributeError(
                "no metrics are kept, since track is None: make the optimizer with track='total', or with "
                "track='parameters' for those of each parameter, or set optimizer.track before a step"
            )
        return self._engine.metrics(self.track)

    @property
    def skipped_steps(self) -> Tensor:
        """How many steps were skipped for non-finite gradients: a 0-dim tensor, a new one at each access."""
        return self._engine.skips.total()

    def layout(self) -> str:
        """What runs where, and why: a line for each device, dtype and formula of the latest step, with the number of
        its parameters, where these lie, and by how many different sets of hyperparameters they are updated."""
        return self._engine.layout()


introspection.add_attributes(FusedOptimizer)
