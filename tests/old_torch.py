"""Repair of torch before 2.12, which the tests take for the truth: its Adagrad makes states in its constructor alone,
and stumbles over parameters that were added, or loaded without a state, later.
"""

import torch
from torch.optim.optimizer import _get_scalar_dtype


def lazily(init_group):
    """``_init_group(self, group, ...)``, after the states that are missing were made, as later versions do it."""

    def wrapper(self, group, *lists):
        value = self.defaults["initial_accumulator_value"]
        for p in group["params"]:
            if p.grad is not None and not self.state[p]:
                start = complex(value, value) if p.is_complex() else value
                step = torch.tensor(0.0, dtype=_get_scalar_dtype())
                total = torch.full_like(p, start, memory_format=torch.preserve_format)
                self.state[p].update(step=step, sum=total)
        return init_group(self, group, *lists)

    return wrapper


def repair():
    """Patch torch of this process."""
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 12):
        torch.optim.Adagrad._init_group = lazily(torch.optim.Adagrad._init_group)
