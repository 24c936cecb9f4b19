"""torch's own table of optimizer cases, ``optim_db``."""

import copy

import pytest
import torch
from options import IN_TORCH

import fusedopt

table = pytest.importorskip(
    "torch.testing._internal.common_optimizers", reason="torch's table needs the package expecttest"
)

INFOS = {info.optim_cls.__name__: info for info in table.optim_db}
FLAGS = ("foreach", "fused", "differentiable")


def ours(name):
    """torch's description of an optimizer, with our class in place of torch's."""
    info = copy.copy(INFOS[name])
    info.optim_cls = fusedopt.registry[name]
    return info


def inputs(name):
    """Every option set of torch's table."""
    return INFOS[name].optim_inputs_func(device="cpu")


every_info = pytest.mark.parametrize("name", IN_TORCH)
every_input = pytest.mark.parametrize(
    ("name", "index"),
    [
        pytest.param(name, index, id=f"{name}-{each.desc.replace(' ', '_')}")
        for name in IN_TORCH
        for index, each in enumerate(inputs(name))
    ],
)


def exact(options):
    """The same options, but a tensor lr in float64: torch computes in the dtype of a tensor lr."""
    return {key: value.double() if isinstance(value, torch.Tensor) else value for key, value in options.items()}
