"""Random bits that depend on seed, step, role and the element's number only: the twin of ``kernels/philox.py``.

Philox 4x32 with 7 rounds, on integers of 64 bits, since torch has no unsigned products of 32.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

ROUNDS = 7
LOW = 0xFFFFFFFF


class Draw(NamedTuple):
    """Where random bits come from."""

    seed: int
    step: int
    """Counted from 1."""
    first: int
    """The number of the first eight elements among all eights of the optimizer."""


def sixteen_bits(draw: Draw, role: int, count: int, device: torch.device) -> Tensor:
    """int32 [count] below 2^16: one draw serves eight elements."""
    eights = draw.first + torch.arange(-(-count // 8), device=device)
    a, b = eights & LOW, eights >> 32
    c, d = torch.full_like(eights, draw.step & LOW), torch.full_like(eights, role)
    key, other_key = draw.seed & LOW, draw.seed >> 32 & LOW
    for _ in range(ROUNDS):
        # Products wrap at 2^64, and are negative from 2^63 on: the masks leave the 32 bits that count.
        x, y = a * 0xD2511F53, c * 0xCD9E8D57
        a, b, c, d = (y >> 32 & LOW) ^ b ^ key, y & LOW, (x >> 32 & LOW) ^ d ^ other_key, x & LOW
        key, other_key = key + 0x9E3779B9 & LOW, other_key + 0xBB67AE85 & LOW
    words = torch.stack([a, b, c, d], dim=1)
    return torch.stack([words & 0xFFFF, words >> 16], dim=2).flatten()[:count].to(torch.int32)
