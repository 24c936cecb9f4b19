"""From one form of a role to another: what is there, its values, and the parts that hold them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import forms
from .flat import is_dense, memory_order
from .forms import Form, nearest, wide
from .storage import MASTER_KEYS, MASTERS, NARROW, part_key


def found(role: str, state: dict[str, Any], p: Tensor) -> tuple[Form, list[Tensor]] | None:
    """The form in which a role is there, and its parts, whatever the settings say now; None if it is not there."""
    if role == "":
        return _found_master(state, p)
    value = state.get(role)
    if value is None:
        return None
    scale = state.get(f"{role}_scale")
    if value.dtype in (torch.int8, torch.uint8) and scale is not None:
        return forms.SIGNED8 if value.dtype is torch.int8 else forms.ROOT8, [value, scale]
    return nearest(value.dtype), [value]


def _found_master(state: dict[str, Any], p: Tensor) -> tuple[Form, list[Tensor]] | None:
    p = p.detach()
    for make in MASTERS.values():
        form = make(p.dtype)
        for part in form.parts[1:]:
            value = state.get(part.suffix)
            if isinstance(value, Tensor) and value.dtype is part.dtype and value.shape == p.shape:
                same_layout = p.stride() == value.stride() and is_dense(p)
                return form, [p if same_layout else torch.empty_like(value, dtype=p.dtype).copy_(p), value]
    return None


def decode(form: Form, parts: list[Tensor], dtype: torch.dtype) -> Tensor:
    """The values that dense parts hold, in their layout."""
    x = forms.TWINS[form.name].load([memory_order(part) for part in parts], dtype)
    return torch.as_strided(x, parts[0].size(), parts[0].stride())


def decode_master(form: Form, parts: list[Tensor]) -> Tensor:
    """float32 values that round to the parameter, for other forms."""
    p, values = parts[0], decode(form, parts, torch.float32)
    if form.name in ("kahan", "split8") and p.dtype is torch.bfloat16:
        # Of 16 significant bits 1 in 256 lies half way between two parameters, where forms round to different ones.
        half_way = values.view(torch.int32) & 0xFFFF == 0x8000
        values = torch.where(half_way, torch.nextafter(values, p.float()), values)
    return values


def encode(form: Form, values: Tensor, strides: tuple[int, ...]) -> list[Tensor]:
    """New parts that hold the values to the nearest, in a layout of those strides."""
    x = torch.empty_strided(values.size(), strides, dtype=values.dtype, device=values.device).copy_(values)
    x = memory_order(x)
    parts = [torch.empty(-(-x.numel() // part.per), dtype=part.dtype, device=x.device) for part in form.parts]
    name = "nearest" if form.draws else form.name
    forms.TWINS[name].store(parts, x, None, 0)
    return [x.as_strided(values.size(), strides) if part.per == 1 else x for x, part in zip(parts, form.parts)]


def encode_master(form: Form, master: Tensor | None, p: Tensor, strides: tuple[int, ...]) -> list[Tensor]:
    """New parts beside the parameter. Together they hold ``master`` wherever ``p`` is what this form rounds it to.
    Where another form has rounded it to ``p``, they come as near to it as this form can. Elsewhere somebody has given
    ``p`` another value since: then that is the master, as it is where there was none."""
    plain = p.detach().float()
    if master is None:
        return encode(form, plain, strides)[1:]
    here = encode(form, master, strides)[0].float() == plain
    offset = master.view(torch.int32) - plain.view(torch.int32)
    nearest = plain.view(torch.int32) + offset.clamp(-0x7FFF, 0x7F7F if form.name == "split8" else 0x7FFF)
    other = torch.where(is_rounded(master, p), nearest.view(torch.float32), plain)
    return encode(form, torch.where(here, master, other), strides)[1:]


def is_rounded(master: Tensor, p: Tensor) -> Tensor:
    """Where ``p`` is what some form makes of ``master``: they differ at numbers half way, "split8" a little before."""
    if p.dtype is not torch.bfloat16:
        return master.to(p.dtype) == p
    return (master.view(torch.int32) - p.detach().float().view(torch.int32)).abs() <= 0x8000


def converted(
    role: str,
    form: Form,
    state: dict[str, Any],
    p: Tensor,
    strides: tuple[int, ...],
    initial: Callable[[], float],
) -> list[Tensor | float]:
    """What the role's parts in ``optimizer.state[p]`` have to hold, so that the value stays what it is there, in
    whatever form, or becomes the initial one."""
    there = found(role, state, p)
    if there is not None and there[0] == form and there[1][0].stride() == strides:
        return there[1] if role else there[1][1:]
    if role == "":
        return encode_master(form, None if there is None else decode_master(*there), p, strides)
    values = None if there is None else there[1][0] if there[0].plain else decode(*there, wide(p.dtype))
    if values is None:
        return beginning(role, form, p, strides, initial)
    return [values.detach()] if form.plain or form.draws else encode(form, values.detach(), strides)


def beginning(
    role: str, form: Form, p: Tensor, strides: tuple[int, ...], initial: Callable[[], float]
) -> list[Tensor | float]:
    """What the parts of a role that is not there have to hold to begin with."""
    if begins_alike(role, form):
        return [initial()]
    if role == "":
        return encode_master(form, None, p, strides)
    return encode(form, torch.full(p.size(), initial(), dtype=wide(p.dtype), device=p.device), strides)


def begins_alike(role: str, form: Form) -> bool:
    """Whether the role begins with the same number for every parameter of a group."""
    return role != "" and (form.plain or form.draws)


def superseded(role: str, form: Form, state: dict[str, Any], p: Tensor) -> list[str]:
    """The keys of parts that another form of this role needed, and this one does not."""
    if role == "" and (p.dtype not in NARROW or _found_master(state, p) is None):
        return []
    keys = MASTER_KEYS if role == "" else (f"{role}_scale",)
    return [key for key in keys if key in state and key not in {part_key(role, part) for part in form.parts}]
