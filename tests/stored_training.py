"""Short trainings with parameters and states in forms of their own."""

import io
import itertools

import pytest
import torch
from options import STATEFUL

import fusedopt

MASTERS = (None, "stochastic", "kahan", "split", "split8", "fp32")
STATE_DTYPES = (None, torch.float32, torch.bfloat16, "8bit")
EXACT = ("split", "fp32")

every_form = pytest.mark.parametrize(("master", "state_dtype"), list(itertools.product(MASTERS, STATE_DTYPES)))


def made(name="AdamW", master=None, state_dtype=None, seed=0, named=False, **options):
    """bfloat16 parameters, of which the small one keeps float32 states, and one is transposed."""
    generator = torch.Generator().manual_seed(seed)
    params = [torch.nn.Parameter(torch.randn(shape, generator=generator).bfloat16()) for shape in (5000, 33, (100, 64))]
    params[2] = torch.nn.Parameter(params[2].detach().t().contiguous().t())
    given = [(f"layer.{k}", p) for k, p in enumerate(params)] if named else params
    options = {"lr": 1e-3, **STATEFUL[name], **options}
    return params, fusedopt.registry[name](given, master=master, state_dtype=state_dtype, **options)


def run(params, optimizer, steps, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator).bfloat16()
        optimizer.step()


def through_file(state_dict):
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def dtypes(params, optimizer):
    return [{key: value.dtype for key, value in optimizer.state[p].items()} for p in params]


def copy_into(params, others):
    with torch.no_grad():
        for p, q in zip(params, others):
            p.copy_(q)
