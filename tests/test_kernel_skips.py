"""Steps that the kernels skip, and gradients that they unscale."""

import itertools
import math

import pytest
import torch
from cases import MAIN_CASES, kernels_overflow, label
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
from thinning import ALL, every_value

from fusedopt.skips import Skips

pytestmark = [pytest.mark.usefixtures("needs_triton"), kernels_overflow]

COUNTING = ["sgd", "momentum", "adagrad", "amsgrad", "ademamix", "nadam", "radam", "adamax", "asgd", "rprop"]
"""Rules whose numbers change with the step count, each in its way, and one without a count."""


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


@every_value
@pytest.mark.parametrize("address", ADDRESSES)
@pytest.mark.parametrize("case", MAIN_CASES)
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
    """As on a GPU that is several steps behind: the host hears of a skip only when it waits for it."""

    launched = told = 0

    def listen(self):
        self.launched += 1
        self.told = int(self.tensor[3])

    def resolve(self, wait=False):
        if not wait:
            return 0
        self.launched = 0
        new, self.known = self.told - self.known, self.told
        return new

    @property
    def variants(self):
        return self.launched + 1


@pytest.mark.parametrize("case", CASES if ALL else COUNTING)
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


@pytest.mark.parametrize("case", ["asgd", "rprop"])
def test_a_first_step_at_another_rate_that_the_host_has_not_heard_of(case, device):
    """What begins at the learning rate begins at that of the first step that is taken."""
    params, others = parameters([5, 1030], device), parameters([5, 1030], device)
    made, reference = (optimizer(case, ps, skip_nonfinite=True) for ps in (params, others))
    made._engine.skips = LateSkips()
    for t, lr in enumerate([0.5, 0.02, 0.01]):
        for each in (made, reference):
            each.param_groups[0]["lr"] = lr
        grads = tensors([5, 1030], device, seed=t)
        set_gradients(others, tensors([5, 1030], device, seed=t))
        if t == 0:
            grads[0][2] = math.inf
        else:
            reference.step()
        set_gradients(params, grads)
        made.step()
    for got, wanted in zip(results(made), results(reference)):
        assert all(map(same_bits, got, wanted))


@pytest.mark.parametrize("case", MAIN_CASES)
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


@pytest.mark.parametrize("settings", [{}, {"track": "total"}, {"max_grad_norm": 1.0, "launches": 1}], ids=label)
def test_numbers_of_a_scaler_may_change_their_dtype(settings, device):
    """And where they lie: a kernel that was compiled for one dtype does not read another."""
    params, others = parameters([5, 1030], device), parameters([5, 1030], device)
    made, reference = optimizer("adam", params, **settings), optimizer("adam", others, **settings)
    for t, (dtype, place) in enumerate(itertools.product((torch.float32, torch.float64), (0, 1))):
        scale, found_inf = torch.tensor([[8.0, 8.0], [0.0, 0.0]], dtype=dtype, device=device)[:, place]
        made.grad_scale, made.found_inf = scale, found_inf
        set_gradients(params, [8 * g for g in tensors([5, 1030], device, seed=t)])
        set_gradients(others, tensors([5, 1030], device, seed=t))
        made.step()
        reference.step()
        for got, wanted in zip(results(made), results(reference)):
            assert all(map(same_bits, got, wanted))


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
