"""The norm kernel and its verdict: exactness, determinism, clipping, unscaling, skipping."""

import math

import numpy as np
import pytest
import torch
from rule_cases import (
    ADDRESSES,
    CASES,
    assert_as_twin,
    optimizer,
    parameters,
    results,
    same_bits,
    set_gradients,
    tensors,
    twin_step,
)

from fusedopt import triton_norm
from fusedopt.clipping import Skips

SIZES = [1, 9, 1031, (), 0, 5000, (3, 7)]

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]

# The warnings are numpy's, in the interpreter, where numbers overflow on purpose.
pytestmark = [
    pytest.mark.usefixtures("needs_triton"),
    pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning"),
]


def norm_of(grads, **settings):
    """The verdict's norm in float64; ``grad_norm`` rounds it for float32 gradients."""
    params = [torch.nn.Parameter(torch.zeros_like(g)) for g in grads]
    set_gradients(params, grads)
    made = optimizer("sgd", params, **({"max_grad_norm": 1.0} | settings))
    made.step()
    exact = made._engine.verdict.device[0].item()
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


def steps_of(made):
    return [int(state["step"]) for state in made.state_dict()["state"].values() if "step" in state]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 1030, 1024])
def test_one_bad_element_is_enough(place, bad, device):
    """First, last, and first of a tile."""
    params = parameters([1031, 2], device)
    made = optimizer("adam", params, skip_nonfinite=True)
    before = results(made)
    grads = tensors([1031, 2], device)
    grads[0][place] = bad
    set_gradients(params, grads)
    made.step()
    assert made.skipped_steps == 1
    assert not math.isfinite(made.grad_norm)
    for got, wanted in zip(results(made), before):
        assert all(map(same_bits, got, wanted))


def test_finite_elements_are_finite_whatever_their_squares(device):
    """1e30 squared overflows float32."""
    params = parameters([9, 1030], device)
    set_gradients(params, [torch.full((9,), 1e30, device=device), torch.zeros(1030, device=device)])
    made = optimizer("sgd", params, skip_nonfinite=True, max_grad_norm=1.0)
    expected = twin_step(made, 1)
    made.step()
    assert made.skipped_steps == 0
    assert_as_twin(made, expected)


@pytest.mark.parametrize("address", ADDRESSES)
@pytest.mark.parametrize("case", CASES)
def test_skipped_steps_leave_no_trace(case, address, device):
    """Steps with bad gradients between good ones: bit for bit as if they had never been."""
    sizes = [5, 1030]
    params, others = parameters(sizes, device), parameters(sizes, device)
    settings = {"skip_nonfinite": True, "max_grad_norm": 1.0, "weight_decay": 0.1}
    made, reference = (optimizer(case, ps, address, **settings) for ps in (params, others))
    for t, bad in enumerate([True, False, True, True, False, False]):
        grads = tensors(sizes, device, seed=t)
        if bad:
            grads[t % 2][t] = math.nan
        set_gradients(params, grads)
        before = results(made)
        made.step()
        if bad:
            for got, wanted in zip(results(made), before):
                assert all(map(same_bits, got, wanted))
        else:
            set_gradients(others, tensors(sizes, device, seed=t))
            reference.step()
            for got, wanted in zip(results(made), results(reference)):
                assert all(map(same_bits, got, wanted))
        # Before the first good step torch has no state yet; a skipped step leaves it at zero.
        assert steps_of(made) == (steps_of(reference) or [0] * len(steps_of(made)))
    assert made.skipped_steps == 3
    assert made.state_dict()["state"].keys() == reference.state_dict()["state"].keys()


def test_a_buffer_that_was_never_written_is_no_state(device):
    """torch takes a momentum buffer's absence for the first step."""
    params = parameters([5], device)
    made = optimizer("momentum", params, skip_nonfinite=True)
    set_gradients(params, [torch.full((5,), math.inf, device=device)])
    made.step()
    assert made.state_dict()["state"].get(0, {}).get("momentum_buffer") is None


class LateSkips(Skips):
    """As on a GPU that is several steps behind: the host hears of a skip only when it asks for the state."""

    launched = 0

    def listen(self):
        self.launched += 1

    def resolve(self, wait=False):
        if not wait:
            return 0
        self.launched = 0
        new = int(self.device[3]) - self.known
        self.known += new
        return new

    @property
    def variants(self):
        return self.launched + 1


@pytest.mark.parametrize("case", CASES)
def test_skips_that_the_host_has_not_heard_of(case, device):
    """The device picks the row of the step count that it knows to be right."""
    params, others = parameters([5, 1030], device), parameters([5, 1030], device)
    made, reference = (optimizer(case, ps, skip_nonfinite=True) for ps in (params, others))
    made._engine.skips = LateSkips()
    for t, bad in enumerate([False, True, False, True, True, False, False]):
        grads = tensors([5, 1030], device, seed=t)
        if bad:
            grads[0][2] = math.inf
        else:
            set_gradients(others, tensors([5, 1030], device, seed=t))
            reference.step()
        set_gradients(params, grads)
        made.step()
    for got, wanted in zip(results(made), results(reference)):
        assert all(map(same_bits, got, wanted))
    assert made.skipped_steps == 3
    assert steps_of(made) == steps_of(reference)


@pytest.mark.parametrize("case", CASES)
def test_nobody_listens_for_skips_that_cannot_be(case, device, monkeypatch):
    """Clipping skips no step: the host asks the device for nothing, also where the rule's scalars depend on skips."""
    monkeypatch.setattr(Skips, "listen", lambda self: pytest.fail("the host asks for the count of skipped steps"))
    params = parameters([5, 1030], device)
    made = optimizer(case, params, max_grad_norm=1.0)
    for t in range(3):
        set_gradients(params, tensors([5, 1030], device, seed=t))
        made.step()


def attach_scaler(made, scale, found_inf, device):
    """What torch.amp.GradScaler does to an optimizer that unscales by itself."""
    made.grad_scale = torch.full((1,), scale, device=device)
    made.found_inf = None if found_inf is None else torch.full((1,), found_inf, device=device)


@pytest.mark.parametrize("settings", [{}, {"max_grad_norm": 0.5, "max_grad_value": 0.01}], ids=["plain", "clipped"])
@pytest.mark.parametrize("address", ADDRESSES)
def test_grad_scale_divides_the_gradients(address, settings, device):
    """By a power of two, so that nothing is rounded and the step equals the unscaled one bit for bit."""
    params, others = parameters([5, 1030], device), parameters([5, 1030], device)
    made, reference = optimizer("adam", params, address, **settings), optimizer("adam", others, **settings)
    for t in range(2):
        set_gradients(params, [g * 65536 for g in tensors([5, 1030], device, seed=t)])
        set_gradients(others, tensors([5, 1030], device, seed=t))
        attach_scaler(made, 65536.0, 0.0, device)
        made.step()
        reference.step()
    for got, wanted in zip(results(made), results(reference)):
        assert all(map(same_bits, got, wanted))
    if settings:
        assert made.grad_norm == reference.grad_norm  # of the unscaled gradients


@pytest.mark.parametrize("settings", [{}, {"max_grad_norm": 0.5}], ids=["plain", "clipped"])
def test_found_inf_skips(settings, device):
    params = parameters([5, 1030], device)
    made = optimizer("adam", params, **settings)
    before = results(made)
    set_gradients(params, tensors([5, 1030], device))
    attach_scaler(made, 4.0, 1.0, device)
    made.step()
    assert made.skipped_steps == 1
    assert steps_of(made) == [0, 0]
    for got, wanted in zip(results(made), before):
        assert all(map(same_bits, got, wanted))
    attach_scaler(made, 4.0, 0.0, device)
    expected = twin_step(made, 1)
    made.grad_scale.fill_(1.0)
    made.step()
    assert made.skipped_steps == 1
    assert steps_of(made) == [1, 1]
    assert_as_twin(made, expected)


def test_the_ticket_and_the_table_survive_many_steps(device):
    """The verdict is passed once per step, by the last program, whatever the last step left behind."""
    params = parameters([5000], device)
    made = optimizer("sgd", params, max_grad_norm=1.0, lr=0.0)
    for t in range(5):
        grads = tensors([5000], device, seed=t, scale=10.0**t)
        set_gradients(params, grads)
        made.step()
        assert made._engine.verdict.device[0].item() == pytest.approx(norm_by_numpy(grads), rel=1e-12)
