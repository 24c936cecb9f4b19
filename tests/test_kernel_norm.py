"""The norm kernel: exactness, determinism, clipping."""

import math

import numpy as np
import pytest
import torch
from cases import kernels_overflow
from rule_cases import ADDRESSES, optimizer, parameters, same_bits, set_gradients, tensors

from fusedopt import triton_norm

SIZES = [1, 9, 1031, (), 0, 5000, (3, 7)]

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]

pytestmark = [pytest.mark.usefixtures("needs_triton"), kernels_overflow]


def norm_of(grads, **settings):
    """The verdict's norm in float64; ``grad_norm`` rounds it for float32 gradients."""
    params = [torch.nn.Parameter(torch.zeros_like(g)) for g in grads]
    set_gradients(params, grads)
    made = optimizer("sgd", params, **({"max_grad_norm": 1.0} | settings))
    made.step()
    exact = made._engine.verdict.tensor[0].item()
    assert made.grad_norm.dtype == torch.promote_types(grads[0].dtype, torch.float32)
    assert made.grad_norm.item() == torch.tensor(exact, dtype=made.grad_norm.dtype).item()
    return exact


def norm_by_numpy(grads):
    return math.sqrt(sum(np.square(g.double().cpu().numpy()).sum() for g in grads))


@pytest.mark.parametrize("slots", [1, 2, 64])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norm_is_exact(dtype, slots, device, monkeypatch):
    """More tiles than slots, and fewer. 1e-12: sums of squares in float64, in another order than numpy's."""
    monkeypatch.setattr(triton_norm, "SLOTS", slots)
    grads = tensors(SIZES, device, dtype)
    assert norm_of(grads) == pytest.approx(norm_by_numpy(grads), rel=1e-12)


def test_norm_of_large_and_small_numbers_is_exact(device):
    """Where float32 would lose the small ones, or overflow."""
    grads = [torch.full((5000,), 1e-3, device=device), torch.full((3,), 1e4, device=device)]
    assert norm_of(grads) == pytest.approx(norm_by_numpy(grads), rel=1e-12)
    for size in (1e30, 1e-30):
        assert norm_of([g * size for g in tensors([1031], device)]) == pytest.approx(
            norm_by_numpy([g * size for g in tensors([1031], device)]), rel=1e-12
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norm_is_the_same_to_the_last_bit(dtype, device):
    """From run to run, wherever the gradients lie, aligned or not, and however the parameters are addressed."""
    grads = tensors(SIZES, device, dtype)
    expected = norm_of(grads)
    for offset in range(5):
        room = torch.empty(10000, dtype=dtype, device=device)
        moved, end = [], 0
        for g in grads:
            end += offset
            moved.append(room[end : end + g.numel()].copy_(g.flatten()).view(g.shape))
            end += g.numel()
        assert norm_of(moved) == expected
    assert norm_of([g.clone() for g in grads], address="flat") == expected


def test_buckets_share_one_norm(device):
    """Parameters of several dtypes: one norm over all, the same factor for each."""
    # The last bucket to be judged is not the last to be given.
    dtypes = [torch.float64, torch.float32, torch.bfloat16, torch.float32, torch.float16]
    params = [parameters([700 + i], device, dtype, seed=i)[0] for i, dtype in enumerate(dtypes)]
    grads = [tensors([700 + i], device, dtype, seed=10 + i)[0] for i, dtype in enumerate(dtypes)]
    set_gradients(params, grads)
    made = optimizer("sgd", params, max_grad_norm=0.7, lr=1.0)
    before = [p.detach().clone() for p in params]
    made.step()
    assert len(made._engine.executors) == 4
    norm = made.grad_norm
    assert norm.dtype is torch.float64
    assert norm.item() == pytest.approx(norm_by_numpy(grads), rel=1e-12)
    factor = 0.7 / (norm.item() + 1e-6)
    for p, old, g in zip(params, before, grads):
        wanted = old.double() - factor * g.double()
        # Half a unit in the last place of a parameter of size 4, and the roundings of a float32 step.
        rounding = 4 * torch.finfo(p.dtype).eps / 2 + (0 if p.dtype is torch.float64 else 1e-6)
        torch.testing.assert_close(p.detach().double(), wanted, rtol=0, atol=rounding)


@pytest.mark.parametrize("address", ADDRESSES)
def test_norm_counts_parameters_of_all_groups_but_only_with_gradients(address, device):
    params = parameters([300, 40, 5], device)
    made = optimizer("adam", [{"params": params[:1]}, {"params": params[1:]}], address, max_grad_norm=1.0)
    grads = tensors([300, 40], device)
    set_gradients(params, grads)
    made.step()
    assert made.grad_norm.item() == pytest.approx(norm_by_numpy(grads), rel=1e-7)  # float32


def test_no_clipping_below_the_limit(device):
    """A factor of exactly 1: bit for bit the step without clipping."""
    params, others = parameters(SIZES, device), parameters(SIZES, device)
    set_gradients(params, tensors(SIZES, device, seed=1))
    set_gradients(others, tensors(SIZES, device, seed=1))
    optimizer("adam", params, max_grad_norm=1e4).step()
    optimizer("adam", others).step()
    assert all(map(same_bits, params, others))


def test_the_ticket_and_the_table_survive_many_steps(device):
    """The verdict is passed once per step, by the last program, whatever the last step left behind."""
    params = parameters([5000], device)
    made = optimizer("sgd", params, max_grad_norm=1.0, lr=0.0)
    for t in range(5):
        grads = tensors([5000], device, seed=t, scale=10.0**t)
        set_gradients(params, grads)
        made.step()
        assert made._engine.verdict.tensor[0].item() == pytest.approx(norm_by_numpy(grads), rel=1e-12)
