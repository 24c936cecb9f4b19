"""Which form each role of a parameter has, and under which keys its parts stand."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import ema, forms
from .forms import Form, Part, nearest, stochastic, wide
from .rule import Rule
from .settings import Settings

SMALL = 4096
"""Elements below which a state stays float32 where larger ones have 8 bits: it is where precision costs nothing."""

NARROW = (torch.bfloat16, torch.float16)
"""Parameter dtypes that lose updates to rounding, and so have uses for a master form."""


class Storage(NamedTuple):
    """The forms of one parameter's roles."""

    param: Form
    kept: tuple[tuple[str, Form], ...]
    """The forms of its states and averages in ``optimizer.state[p]``, by key."""
    beside: tuple[tuple[str, Form], ...] = ()
    """The form of the moving average, which stands elsewhere."""

    @property
    def roles(self) -> tuple[tuple[str, Form], ...]:
        return (("", self.param), *self.kept, *self.beside)

    @property
    def dtypes(self) -> set[torch.dtype]:
        """The dtypes of what everybody sees: the parameter, the states."""
        return {form.parts[0].dtype for _, form in (("", self.param), *self.kept)}

    @property
    def plain(self) -> bool:
        return all(form.plain for _, form in self.roles)

    @property
    def draws(self) -> bool:
        return any(form.draws for _, form in self.roles)

    @property
    def quantizes(self) -> bool:
        return any(part.per > 1 for _, form in self.roles for part in form.parts)

    @property
    def parts(self) -> dict[str, Part]:
        """Everything in ``optimizer.state[p]`` besides the step."""
        return _parts(self)

    @property
    def kept_parts(self) -> list[tuple[str, Form, dict[str, Part]]]:
        """The parts of each role, by key."""
        return _kept_parts(self)

    @property
    def kept_keys(self) -> list[str]:
        """The keys of all parts of what is kept; not those of the parameter's own."""
        return [part_key(role, part) for role, form in self.kept for part in form.parts]


@functools.cache
def _parts(storage: Storage) -> dict[str, Part]:
    return {key: part for _, _, parts in _kept_parts(storage) for key, part in parts.items()}


@functools.cache
def _kept_parts(storage: Storage) -> list[tuple[str, Form, dict[str, Part]]]:
    found = []
    for role, form in (("", storage.param), *storage.kept):
        parts = {part_key(role, part): part for part in form.parts}
        parts.pop("", None)  # the parameter itself
        found.append((role, form, parts))
    return found


def part_key(role: str, part: Part) -> str:
    """Under which key of ``optimizer.state[p]`` a part stands: "exp_avg", "exp_avg_scale", "master"."""
    return "_".join(filter(None, (role, part.suffix)))


MASTERS = {
    "stochastic": stochastic,
    "kahan": lambda dtype: Form("kahan", (Part("", dtype), Part("compensation", dtype))),
    "split": lambda dtype: Form("split", (Part("", dtype), Part("master_low", torch.int16))),
    "split8": lambda dtype: Form("split8", (Part("", dtype), Part("master_low", torch.int8))),
    "fp32": lambda dtype: Form("fp32", (Part("", dtype), Part("master", torch.float32))),
}
"""The parameter's form for each choice of ``master``."""

MASTER_KEYS = {
    "master": (torch.float32, torch.float64, *NARROW),  # torch.optim casts what it loads to the parameter's dtype
    "master_low": (torch.int16, torch.int8),
    "compensation": NARROW,
}
"""Under which keys of ``optimizer.state[p]`` a master's parts beside the parameter stand, and in which dtypes."""


def counts_steps(optimizer: Any, stored: Storage) -> bool:
    """Whether there is a step count: as in torch, and wherever random bits depend on it."""
    return bool(optimizer.counts_steps and stored.parts) or stored.draws


def state_keys(optimizer: Any, rule: Rule, stored: Storage) -> list[str]:
    """The keys of ``optimizer.state[p]``."""
    return [*(("step",) if counts_steps(optimizer, stored) else ()), *rule.scalars, *stored.parts]


def traits(p: Tensor, rule: Rule, state: dict[str, Any]) -> tuple:
    """What of a parameter and its state decides how it is stored, numbers beside it included: equal traits, equal
    storage."""
    dtypes = [getattr(state.get(key), "dtype", None) for key in (*rule.keys, *rule.scalars)] if state else ()
    return p.dtype, p.numel() < SMALL, *dtypes


def storage(p: Tensor, rule: Rule, settings: Settings, state: dict[str, Any]) -> Storage:
    """How the settings want ``p`` and its states stored. Without a ``state_dtype`` a state keeps the dtype that
    somebody gave it."""
    return Storage(
        param_form(p, settings.master),
        tuple((key, _state_form(p, key, rule, settings.state_dtype, state.get(key))) for key in rule.keys),
        () if settings.ema_decay is None else ((ema.ROLE, nearest(wide(p.dtype))),),
    )


def param_form(p: Tensor, master: str | None) -> Form:
    if master is None or p.dtype not in NARROW:
        return nearest(p.dtype)
    if p.dtype is torch.float16 and master in ("split", "split8"):
        raise ValueError(
            f"master={master!r} joins the upper half of a float32, which is a bfloat16, with bits of its lower half, "
            "and a parameter is float16; choose 'fp32', 'kahan' or 'stochastic'"
        )
    return MASTERS[master](p.dtype)


def _state_form(p: Tensor, key: str, rule: Rule, state_dtype: Any, value: Any) -> Form:
    if state_dtype is None:
        return nearest(value.dtype if isinstance(value, Tensor) and value.is_floating_point() else p.dtype)
    if state_dtype is torch.float32 or key in rule.exact:
        return nearest(torch.float32)
    if state_dtype is torch.bfloat16:
        return stochastic(torch.bfloat16)
    if p.numel() < SMALL or key in rule.averages or key in rule.uncoded:
        return nearest(torch.float32)
    return forms.ROOT8 if key in rule.squares else forms.SIGNED8


def check(settings: Settings, params: list[Tensor]) -> None:
    """Raise ValueError for a ``master`` with which none of the parameters, or one of them, can have anything to do."""
    if settings.master is None:
        return
    narrow = [p for p in params if p.dtype in NARROW]
    for p in narrow:
        param_form(p, settings.master)
    if params and not narrow:
        dtypes = ", ".join(sorted({str(p.dtype).removeprefix("torch.") for p in params}))
        raise ValueError(
            f"master={settings.master!r} is for bfloat16 and float16 parameters, and these are {dtypes}: "
            "leave it out, they lose nothing"
        )


def quantization_problem(rule: Rule, key: str, value: Tensor, scale: Any) -> str | None:
    """Why a state of integers cannot be read, or None."""
    form = forms.ROOT8 if key in rule.squares else forms.SIGNED8
    code = form.parts[0].dtype
    if value.is_floating_point() or (value.dtype not in (torch.int8, torch.uint8) and scale is None):
        return None
    if value.dtype is not code:
        return f"the state {key!r} has dtype {value.dtype}; in 8 bits it is {code}, else a floating-point dtype"
    if not isinstance(scale, Tensor) or not scale.is_floating_point():
        given = f"is {scale.dtype}" if isinstance(scale, Tensor) else "is not there"
        return f"the state {key!r} has 8 bits, but {key + '_scale'!r}, which must be float32, {given}"
    blocks = -(-value.numel() // forms.QUANTIZED)
    if scale.shape != (blocks,):
        return (
            f"the state {key!r} has {value.numel()} elements of 8 bits, hence {blocks} scales, one for every "
            f"{forms.QUANTIZED}; {key + '_scale'!r} has shape {tuple(scale.shape)}"
        )
    return None
