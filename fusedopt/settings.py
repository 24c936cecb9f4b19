"""What fusedopt adds to torch.optim's arguments, kept outside the parameter groups.

A key more in a group than torch has would make checkpoints of the two incompatible, so the settings
live in one object of their own. Wrappers that copy an optimizer's ``__dict__`` share that object, and
so see every change. A new setting is one field here: constructors, signatures, attributes and the documentation
of every class are made from it. A setting of some classes only is a field of a subclass of ``Settings``, which these
name as their ``settings_class``.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
from collections.abc import Callable, Collection
from typing import Any

from . import setting_checks
from .setting_checks import flag, one_of

CLIP = (1e-6, 1.0)
"""epsilon and the largest factor of g <- g min(largest, S / (norm + epsilon)), as torch.nn.utils.clip_grad_norm_ has
them: zero gradients stay zero."""

NORMALIZE = (1e-300, 2.0**126)
"""The same for normalized gradients: 2^126 and its inverse are normal numbers in float32."""


def setting(default: Any, check: Callable[[str, Any], Any], doc: str) -> Any:
    """A field of Settings: ``check(name, value)`` returns the value to keep, or raises."""
    return dataclasses.field(default=default, metadata={"check": check, "doc": doc})


@dataclasses.dataclass(kw_only=True)
class Settings:
    max_grad_norm: float | None = setting(
        None,
        setting_checks.norm,
        """(float, optional): clip the norm over the gradients of all groups to this before the rule,
        g <- g min(1, max_grad_norm / (norm + 1e-6)), as torch.nn.utils.clip_grad_norm_ does.""",
    )
    grad_norm_mode: str = setting(
        "clip",
        one_of("clip", "normalize"),
        """("clip" | "normalize"): "normalize" scales the norm to max_grad_norm at every step, also upwards:
        g <- g max_grad_norm / norm. Zero gradients stay zero, and nothing is enlarged by more than 2^126.""",
    )
    adaptive_grad_clip: float | None = setting(
        None,
        setting_checks.clipping,
        """(float, optional): after the norm over all, clip the gradient of each unit to this part of its parameters'
        norm, g <- g min(1, adaptive_grad_clip max(|p|, 1e-3) / |g|), as in arXiv 2102.06171. A unit is a row of a
        matrix, a filter of a convolution, else all of a parameter. On a GPU that is one launch more.""",
    )
    max_grad_value: float | tuple[float | None, float | None] | None = setting(
        None,
        setting_checks.limits,
        """(float or pair, optional): clip every component after that, to [-L, L], or to [low, high] if
        given as a pair, in which None means no limit.""",
    )
    skip_nonfinite: bool = setting(
        False,
        flag,
        """(bool): leave parameters, states and step counts untouched at a step where a gradient has an inf
        or NaN; ``skipped_steps`` counts them.""",
    )
    ema_decay: float | None = setting(
        None,
        setting_checks.decay,
        """(float, optional): keep a moving average of every parameter, a <- a + (1 - ema_decay) (p - a) with
        the new p: see ``ema_parameters``, ``ema_state_dict`` and ``load_ema_state_dict``.""",
    )
    cautious: bool = setting(
        False,
        flag,
        """(bool): move only where the update direction u and the gradient g agree in sign, for every rule what
        arXiv 2411.16085 calls C-AdamW for Adam: u <- u mask / max(mean mask, 1e-3), where mask = [u g > 0] and the
        mean is over each parameter, before decoupled decay.""",
    )
    clip_group: Any = setting(
        None,
        setting_checks.group,
        """("world" | ProcessGroup | DeviceMesh | None): further ranks whose gradients belong to the same norm,
        where they hold other parameters than this rank and nothing in the parameters says so: "world" for
        ZeroRedundancyOptimizer and FullyShardedDataParallel, the pipeline's group for pipeline stages. Parameters
        that are DTensors (fully_shard, tensor parallelism) need none.""",
    )
    track: str | None = setting(
        None,
        one_of("total", "parameters", None),
        """("total" | "parameters" | None): keep the norms of gradient, update and parameter of the latest step for
        ``metrics``, of all parameters together or of each; taken while the update has the numbers at hand.""",
    )
    launches: str | int = setting(
        "auto",
        one_of("auto", 1, 2),
        """("auto" | 1 | 2): on a GPU, clip and update by a launch each (2), or by one cooperative launch (1), which
        needs a single device, dtype and rule; "auto" is 2 until a measurement on that GPU speaks for 1.""",
    )
    flatten: bool = setting(
        False,
        flag,
        """(bool): move plain dense parameters that alone own their memory into one flat buffer, on CPUs and on GPUs
        of CUDA or ROCm.""",
    )
    flat_grads: bool | str = setting(
        False,
        setting_checks.flat_grads,
        """(bool or "zeroed"): keep gradients in one flat buffer per device and dtype, into which backward adds, at
        addresses that stay: ``zero_grad()`` fills it with zeros, from the first call on and whatever ``set_to_none``
        says, so that every parameter has a gradient at every step, unless it is frozen (``requires_grad=False``). A
        gradient that somebody else put there (DistributedDataParallel's buckets) is used as it is. With "zeroed" each
        step leaves the buffer so, a skipped one too, and ``zero_grad()`` right behind it has nothing to do: gradients
        cannot be read after the step.""",
    )
    master: str | None = setting(
        None,
        one_of("stochastic", "kahan", "split", "split8", "fp32", None),
        """("stochastic" | "kahan" | "split" | "split8" | "fp32" | None): how bfloat16 and float16 parameters keep
        what rounding would take from them. None rounds to the nearest; "stochastic" up or down at random, right in
        the mean; "kahan" remembers what was rounded off in the parameter's dtype; "split" (bfloat16) the lower 16
        bits of an exact float32, "split8" 8 of them; "fp32" a float32 copy. Wider parameters need none.""",
    )
    state_dtype: Any = setting(
        None,
        setting_checks.state_dtype,
        """(torch.float32 | torch.bfloat16, or their names | "8bit" | None): how states are stored; arithmetic is
        float32 all the same. None is the parameter's dtype, as in torch; torch.float32 is better for 16-bit parameters.
        torch.bfloat16 is rounded stochastically. "8bit" keeps 256 elements of a state to a float32 scale, the roots
        of averages of squares, and in float32 states of fewer than 4096 elements and those that codes would break.""",
    )
    seed: int = setting(
        0,
        setting_checks.seed,
        """(int): of stochastic rounding, which depends on it, the step and the element's number only. Where nothing is
        rounded at random every seed gives the same, and it waits for a ``master`` or ``state_dtype`` set later.""",
    )
    backend: str | None = setting(
        None,
        setting_checks.backend,
        """("torch" | "triton" | None): None takes Triton kernels on GPUs and torch elsewhere.""",
    )

    def __post_init__(self) -> None:
        self._check_together(vars(self))

    def __deepcopy__(self, memo: dict) -> Settings:
        return copy.copy(self)  # values are immutable, but for process groups, of which there are no copies

    def __setattr__(self, name: str, value: Any) -> None:
        fields = self.fields()
        value = fields[name].metadata["check"](name, value)
        if fields.keys() <= vars(self).keys():  # in the constructor, which sets one after the other, some are missing
            self._check_together(vars(self) | {name: value})
        super().__setattr__(name, value)
        for derived in vars(self).keys() - fields.keys():
            delattr(self, derived)

    @staticmethod
    def _check_together(values: dict[str, Any]) -> None:
        if values["grad_norm_mode"] != "clip" and values["max_grad_norm"] is None:
            raise ValueError(
                f"grad_norm_mode={values['grad_norm_mode']!r} needs max_grad_norm, the norm to scale to: "
                "give both, or grad_norm_mode='clip'"
            )

    @classmethod
    def fields(cls) -> dict[str, dataclasses.Field]:
        """The settings by name, in the order of the signature."""
        return cls.__dataclass_fields__

    def refuse_in_group(self, group: dict[str, Any], known: Collection[str]) -> None:
        """ValueError for a group that would have a setting of its own, unless it is an option of the formula's too.
        ZeroRedundancyOptimizer repeats the whole optimizer's settings in each group: that is none."""
        for name in group.keys() & self.fields().keys() - set(known):
            if group[name] != getattr(self, name):
                raise ValueError(
                    f"{name} is no option of a parameter group, but one of the whole optimizer: take it out of the "
                    f"group, and give it as {name}={group[name]!r} beside the parameters"
                )

    # What follows from the settings is read at every step, and kept until one of them changes.

    @functools.cached_property
    def value_limits(self) -> tuple[float, float]:
        """The lower and the upper limit of each gradient component."""
        limit = self.max_grad_value
        low, high = limit if isinstance(limit, tuple) else (None if limit is None else -limit, limit)
        return -math.inf if low is None else low, math.inf if high is None else high

    @functools.cached_property
    def clip(self) -> tuple[float, float, float] | None:
        """S, epsilon and the largest factor of g <- g min(largest, S / (norm + epsilon))."""
        if self.max_grad_norm is None:
            return None
        return (self.max_grad_norm, *(CLIP if self.grad_norm_mode == "clip" else NORMALIZE))

    @functools.cached_property
    def needs_norm(self) -> bool:
        return self.max_grad_norm is not None or self.skip_nonfinite

    @functools.cached_property
    def looks_inside(self) -> bool:
        """Whether something between the gradient and the parameter is changed or looked at, besides the formula."""
        return any(x is not None for x in (self.max_grad_value, self.adaptive_grad_clip, self.track))

    @functools.cached_property
    def layout(self) -> tuple:
        """What decides where tensors are put, and by which formula they are updated: a plan holds as long as it stays
        the same."""
        whole = self.flatten, self.backend, self.cautious, self.clip_group, self.master, self.state_dtype
        # Of these only whether they are set: their numbers may change from step to step.
        is_set = self.ema_decay is None, self.track is None, self.adaptive_grad_clip is None
        formula = [getattr(self, name) for name in self.fields() if name not in Settings.fields()]
        return *whole, *is_set, self.looks_inside, self.needs_norm, *formula

    def active(self) -> list[str]:
        """The names of the settings that ask for more than torch.optim does."""
        plain = {name: field.default for name, field in self.fields().items()} | {"backend": "torch"}
        # A seed asks for nothing by itself.
        return [name for name in self.fields() if name != "seed" and getattr(self, name) not in (None, plain[name])]

    @classmethod
    def documentation(cls) -> str:
        """What the classes' docstrings say of the settings."""
        return "\n".join(f"    {name} {field.metadata['doc']}" for name, field in cls.fields().items())


class SettingAttributes:
    """What type checkers know of the properties that ``introspection.add_attributes`` gives a class for its settings:
    those that every class has. A class with more names them itself."""

    max_grad_norm: float | None
    grad_norm_mode: str
    adaptive_grad_clip: float | None
    max_grad_value: float | tuple[float | None, float | None] | None
    skip_nonfinite: bool
    ema_decay: float | None
    cautious: bool
    clip_group: Any
    track: str | None
    launches: str | int
    flatten: bool
    flat_grads: bool | str
    master: str | None
    state_dtype: Any
    seed: int
    backend: str | None


@dataclasses.dataclass(kw_only=True)
class EpsSettings(Settings):
    """For the rules that divide by a root."""

    eps_inside_sqrt: bool = setting(
        False,
        flag,
        """(bool): divide by sqrt(v + eps), as many textbooks do, instead of sqrt(v) + eps.""",
    )
