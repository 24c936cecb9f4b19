"""Devices on which an address does not say where memory is, and which have no float64, as Apple's MPS: torch's
operations do there what they do elsewhere. A CPU stands in whose memory cannot be handed on, and a GPU that refuses
float64."""

import contextlib

import pytest
import torch
from feature_runs import Run
from features import KINDS, STEPS, absent, program
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fusedopt
from fusedopt import devices

FEATURES = [name for name in KINDS if not absent(program([name]))]
WIDE = {"float64", "two dtypes", "tensor lr"}
"""Where somebody has put float64 on the device."""

BY_TORCH = {"GradScaler", "GradScaler.unscale_", "torch.amp.GradScaler", "clip_grad_norm_", "grad_scale, found_inf"}
"""What torch itself does without our kernels, where no argument of ours is given: it takes float64 on all but MPS."""


@pytest.fixture
def others(monkeypatch):
    """From here on every device is one on which the package is not tested."""
    monkeypatch.setattr(devices, "OURS", frozenset())
    devices.sum_dtype.cache_clear()
    yield
    devices.sum_dtype.cache_clear()


class WithoutFloat64(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        if any(isinstance(x, torch.Tensor) and x.is_cuda and x.dtype == torch.float64 for x in tree_leaves(made)):
            raise TypeError(f"{function} makes float64, which the device does not have")
        return made


def seen(feature, device, at_steps=contextlib.nullcontext):
    run = Run(program([feature]), torch.device(device), "torch")
    for number in range(STEPS):
        with at_steps():
            run.step(number, None)
    return {name: x.detach().cpu().clone() for name, x in run.seen().items()}


@pytest.mark.parametrize("feature", FEATURES)
def test_plain_views_take_the_place_of_aliases(feature, request):
    expected = seen(feature, "cpu")
    request.getfixturevalue("others")
    torch.testing.assert_close(seen(feature, "cpu"), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CPU has float64")
@pytest.mark.parametrize("feature", [name for name in FEATURES if name not in WIDE | BY_TORCH])
def test_nothing_asks_the_device_for_float64(feature, others):
    # The device adds float32 in an order of its own; 16-bit results may be one step apart.
    tolerance = 1e-2 if KINDS[feature] in ("dtype", "master", "states") else 1e-5
    found, expected = seen(feature, "cuda", WithoutFloat64), seen(feature, "cpu")
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance, equal_nan=True, check_dtype=False)


def test_parameters_stay_in_place(others):
    p = torch.nn.Parameter(torch.ones(5))
    before = p.data_ptr()
    optimizer = fusedopt.AdamW([p], flatten=True)
    p.grad = torch.ones(5)
    optimizer.step()
    assert p.data_ptr() == before
    assert "left in place" in optimizer.layout()
