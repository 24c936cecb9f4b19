"""One small step by every kernel, in each form in which it is compiled: for tools that watch what a GPU does.

python bench/every_kernel.py [--few]
"""

from __future__ import annotations

import sys

import torch
from device import device

import fusedopt

SHAPES = [(9000,), (2500,), (33,), (0,), (64, 40), ()]
"""Several tiles, remainders, nothing, rows, one element."""

CLIPPED = {"max_grad_norm": 0.5, "skip_nonfinite": True}

SETTINGS = {
    "update": {},
    "norm, update": CLIPPED,
    "one launch": CLIPPED | {"launches": 1},
    "one launch, tracked": CLIPPED | {"launches": 1, "track": "total"},
    "means, units, tracked": CLIPPED
    | {"cautious": True, "adaptive_grad_clip": 0.1, "track": "parameters", "ema_decay": 0.9, "max_grad_value": 0.3},
    "counted by the device": CLIPPED | {"capturable": True},
    "flat, zeros left": CLIPPED | {"flatten": True, "flat_grads": "zeroed"},
}

STORED = {
    "float32": (torch.float32, {}),
    "bfloat16": (torch.bfloat16, {}),
    "8 bits": (torch.bfloat16, {"master": "split8", "state_dtype": "8bit"}),
    "rounded at random": (torch.bfloat16, {"master": "stochastic", "state_dtype": torch.bfloat16}),
}


def main() -> None:
    on = device()
    count = 1 if "--few" in sys.argv else None
    for label, settings in list(SETTINGS.items())[:count]:
        for name, (dtype, stored) in list(STORED.items())[:count]:
            step(on.name, dtype, **settings, **stored)
            on.settle()
            print(f"{label}, {name}", flush=True)


def step(where: str, dtype: torch.dtype, **settings) -> None:
    """Two steps, the second of which has misaligned gradients, and one more that is skipped where that can be."""
    generator = torch.Generator(where).manual_seed(0)
    # Small tensors keep float32 states, and what is stored otherwise takes another launch.
    shapes = SHAPES[:1] if settings.get("launches") == 1 else SHAPES
    params = [torch.nn.Parameter(torch.randn(s, generator=generator, device=where).to(dtype)) for s in shapes]
    optimizer = fusedopt.AdamW(params, lr=1e-2, backend="triton", **settings)
    optimizer.zero_grad()
    for number in range(3):
        for p in params:
            memory = torch.randn(p.numel() + 1, generator=generator, device=where).to(dtype)
            g = (memory[1:] if number == 1 else memory[:-1]).view(p.shape)
            if number == 2 and settings.get("skip_nonfinite"):
                g.fill_(float("nan"))
            if p.grad is not None and optimizer.flat_grads:
                p.grad.copy_(g)
            else:
                p.grad = g
        optimizer.step()


if __name__ == "__main__":
    main()
