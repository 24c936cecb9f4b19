"""Gradients with NaN or inf where parameters and states are stored in fewer bits."""

import math

import pytest
import torch
from rule_cases import same_bits
from thinning import every_pair

import fusedopt
from fusedopt import storage

STORED = [("split8", "8bit"), ("stochastic", torch.bfloat16), ("kahan", "8bit"), (None, "8bit")]
SIZES = (1024 + 300, 33)
BAD = 300

pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide):RuntimeWarning:triton")


@pytest.fixture(autouse=True)
def small_tensors_have_quantized_states(monkeypatch):
    monkeypatch.setattr(storage, "SMALL", 1000)


def trained(backend, device, master, state_dtype, steps, **settings):
    """Parameters and their optimizer after these steps; at a step "bad" one number of the gradient is ``bad``."""
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(size, generator=generator).bfloat16().to(device)) for size in SIZES]
    optimizer = fusedopt.AdamW(params, lr=0.01, master=master, state_dtype=state_dtype, backend=backend, **settings)
    for number, bad in steps:
        generator.manual_seed(number)
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator).bfloat16().to(device)
        if bad is not None:
            params[0].grad[BAD] = bad
        optimizer.step()
    return params, optimizer


def everything(params, optimizer):
    shown = optimizer.state_dict(compact=True)["state"]
    return [*(p.detach() for p in params), *(x.to("cpu") for entry in shown.values() for x in entry.values())]


@every_pair
@pytest.mark.parametrize("bad", [math.nan, -math.inf])
@pytest.mark.parametrize(("master", "state_dtype"), STORED, ids=str)
def test_only_that_step_is_skipped(backend, device, master, state_dtype, bad):
    """To the last bit, random ones included."""
    with_bad = trained(backend, device, master, state_dtype, [(1, None), (2, bad), (3, None)], skip_nonfinite=True)
    without = trained(backend, device, master, state_dtype, [(1, None), (3, None)], skip_nonfinite=True)
    assert int(with_bad[1].skipped_steps) == 1
    assert all(map(same_bits, everything(*with_bad), everything(*without)))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("master", ["split8", "kahan", None])
def test_without_skipping_it_fills_its_block_of_256_and_no_other(backend, device, master, bad):
    """In float32 states it would stay in its element, which is lost either way; the scale is the block's."""
    params, optimizer = trained(backend, device, master, "8bit", [(1, None), (2, bad), (3, None)])
    clean, other = trained(backend, device, master, "8bit", [(1, None), (2, None), (3, None)])
    block = torch.zeros(SIZES[0], dtype=torch.bool)
    block[256:512] = True
    assert params[0].isnan().cpu().equal(block)
    assert same_bits(params[0][~block], clean[0][~block])
    assert same_bits(params[1], clean[1])
    for p, q in zip(params, clean):
        for key, value in optimizer.state[p].items():
            if key.endswith("_scale"):
                expected = other.state[q][key].clone()
                expected[1] = math.nan
                assert torch.equal(value.nan_to_num(7.0), expected.nan_to_num(7.0))
