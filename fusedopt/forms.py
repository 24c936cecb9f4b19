"""How float32 values are stored: the twins of the forms in ``kernels/rounding.py``, under the same names.

A form keeps one value per element in one tensor or more, its parts. The first is what everybody sees: the parameter,
or the state under its own key. The others stand beside it in ``optimizer.state[p]``.

    load(parts) -> x        store(parts, x, draw, role)

``x`` has the first part's shape, or is one-dimensional like all parts; it is float32, or float64 for float64
parameters, and may be the first part itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .philox import Draw, sixteen_bits

QUANTIZED = 256
"""Elements that share one scale."""


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of arithmetic with parameters of that dtype."""
    return torch.promote_types(dtype, torch.float32)


class Part(NamedTuple):
    """One tensor of a form."""

    suffix: str
    """Of its key: "" for the visible one."""
    dtype: torch.dtype
    per: int = 1
    """Elements of the parameter for each of its own."""


class Form(NamedTuple):
    name: str
    parts: tuple[Part, ...]

    @property
    def draws(self) -> bool:
        """Whether it needs random bits."""
        return self.name == "stochastic"

    @property
    def plain(self) -> bool:
        """Whether it is one tensor of numbers, rounded to the nearest."""
        return self.name == "nearest"


def nearest(dtype: torch.dtype) -> Form:
    return Form("nearest", (Part("", dtype),))


def stochastic(dtype: torch.dtype) -> Form:
    return Form("stochastic", (Part("", dtype),))


SIGNED8 = Form("signed8", (Part("", torch.int8), Part("scale", torch.float32, QUANTIZED)))
ROOT8 = Form("root8", (Part("", torch.uint8), Part("scale", torch.float32, QUANTIZED)))


class Twin(NamedTuple):
    load: Callable[[Sequence[Tensor], torch.dtype], Tensor]
    store: Callable[[Sequence[Tensor], Tensor, Draw | None, int], None]


def load_nearest(parts, dtype):
    return parts[0].to(dtype)


def store_nearest(parts, x, draw, role):
    parts[0].copy_(x)


def store_stochastic(parts, x, draw, role):
    bits = sixteen_bits(draw, role, x.numel(), x.device)
    x = x.float()
    if parts[0].dtype is torch.bfloat16:
        rounded = (x.view(torch.int32) + bits >> 16).to(torch.int16).view(torch.bfloat16)
    else:
        # float16 keeps 13 bits less than float32; below 2^-14 it has steps of 2^-24, which are those of the numbers
        # from 2^-14 to 2^-13.
        size = x.abs()
        lift = torch.where(size < 2.0**-14, 2.0**-14, 0.0)
        up = (size + lift).view(torch.int32) + (bits >> 3) & -(1 << 13)
        rounded = (up.view(torch.float32) - lift).copysign_(x).to(torch.float16)
    parts[0].copy_(torch.where(x == x, rounded, x.to(rounded.dtype)))


def load_kahan(parts, dtype):
    p, c = parts
    x = p.to(dtype)
    exact = x + c.to(dtype)
    return torch.where(exact.to(p.dtype) == p, exact, x)


def store_kahan(parts, x, draw, role):
    p = x.to(parts[0].dtype)
    c = (x - p.to(x.dtype)).to(p.dtype)
    c = c.view(torch.int16) - ((p.to(x.dtype) + c.to(x.dtype)).to(p.dtype) != p).to(torch.int16)
    parts[0].copy_(p)
    parts[1].copy_(torch.where(x.abs() < float("inf"), c, 0).view(p.dtype))


def load_fp32(parts, dtype):
    p, master = parts
    return torch.where(master.to(p.dtype) == p, master, p.to(dtype))


def store_fp32(parts, x, draw, role):
    parts[0].copy_(x)
    parts[1].copy_(x)


def load_split(parts, dtype):
    high = parts[0].view(torch.int16).to(torch.int32) << 16
    low = parts[1].to(torch.int32) << 16 - 8 * parts[1].itemsize
    low = torch.where(high << 1 == 0, low.clamp(min=0), low)
    return (high + low).view(torch.float32)


def store_split(parts, x, draw, role):
    bits = torch.where(x == x, x.view(torch.int32), 0x7FC00000)
    if parts[1].dtype is torch.int8:
        bits += 0x80
    parts[0].copy_((bits + 0x8000 >> 16).to(torch.int16).view(torch.bfloat16))
    parts[1].copy_(bits >> 16 - 8 * parts[1].itemsize)


def load_signed8(parts, dtype):
    return scaled(parts).to(dtype)


def store_signed8(parts, x, draw, role):
    parts[0].copy_(quantized(x.float(), 127, parts[1]))


def load_root8(parts, dtype):
    return scaled(parts).square_().to(dtype)


def store_root8(parts, x, draw, role):
    root = x.float().sqrt()
    q = quantized(root, 255, parts[1])
    parts[0].copy_(torch.where(root > 0, q.clamp(min=1), q))


def scaled(parts):
    q, scales = parts
    return q.to(torch.float32) * scales.repeat_interleave(QUANTIZED)[: q.numel()]


def quantized(x, steps, scales):
    """Each block's x / scale, rounded; stores the scales."""
    blocks = torch.zeros(len(scales), QUANTIZED, dtype=torch.float32, device=x.device)
    blocks.view(-1)[: x.numel()] = x
    # Not below the smallest normal number, whose reciprocal is finite.
    scale = (blocks.abs().amax(1) * (1.0 / steps)).clamp_(min=2.0**-126)
    scales.copy_(torch.where(scale < float("inf"), scale, float("nan")))
    q = (blocks * (1 / scale)[:, None]).round_().nan_to_num_(0.0)
    return q.view(-1)[: x.numel()]


TWINS = {
    "nearest": Twin(load_nearest, store_nearest),
    "stochastic": Twin(load_nearest, store_stochastic),
    "kahan": Twin(load_kahan, store_kahan),
    "fp32": Twin(load_fp32, store_fp32),
    "split": Twin(load_split, store_split),
    "split8": Twin(load_split, store_split),
    "signed8": Twin(load_signed8, store_signed8),
    "root8": Twin(load_root8, store_root8),
}
