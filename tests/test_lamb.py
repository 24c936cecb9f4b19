"""What LAMB does with norms; the paper's algorithm stands in oracles.py, with which all tests compare it."""

import pytest
import torch
from cases import model
from options import LR
from pairs import close

import fusedopt


def give(params, number):
    generator = torch.Generator().manual_seed(number)
    for p in params:
        p.grad = torch.empty_like(p).copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64))


@pytest.mark.parametrize("flatten", [False, True])
def test_steps_are_in_proportion_to_parameters(flatten, backend, device):
    params = [torch.nn.Parameter(torch.full((40, 30), size, device=device)) for size in (1e-3, 1.0, 1e3)]
    made = fusedopt.LAMB(params, lr=LR, flatten=flatten, backend=backend)
    for number in range(3):
        give(params, number)
        before = [p.detach().double() for p in params]
        made.step()
        for p, start in zip(params, before):
            step = torch.linalg.vector_norm(p.detach().double() - start) / torch.linalg.vector_norm(start)
            # 1200 float32 parameters, each rounded by half of 6e-8 of 1 / LR = 30 steps.
            assert step.item() == pytest.approx(LR, rel=2e-6)


def test_without_a_ratio_it_is_adamw(backend, device):
    """Where the parameter is zero, or the group has no decay; in one launch with those that adapt."""
    zero, bias, weight = ([torch.nn.Parameter(x.clone()) for _ in range(2)] for x in (
        torch.zeros(7, 5, device=device), torch.ones(9, device=device), torch.ones(6, 4, device=device),
    ))  # fmt: skip
    groups = [{"params": [zero[0], weight[0]]}, {"params": [bias[0]], "weight_decay": 0.0}]
    made = fusedopt.LAMB(groups, lr=LR, weight_decay=0.1, backend=backend)
    groups = [{"params": [zero[1], weight[1]]}, {"params": [bias[1]], "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=LR, weight_decay=0.1, eps=1e-6)
    give([p[0] for p in (zero, bias, weight)], 1)
    give([p[1] for p in (zero, bias, weight)], 1)
    made.step()
    adamw.step()
    for p in (zero, bias):
        # A few roundings of 6e-8.
        torch.testing.assert_close(p[0], p[1], rtol=3e-7, atol=1e-8)
    assert (weight[0] - weight[1]).abs().min() > 0.01 * LR
    assert len(made.layout().splitlines()) == 1


def test_with_cautious(backend, device):
    """The norm is that of the step before the mask."""
    params = model("tiny", device=device)
    made = fusedopt.LAMB(params, lr=LR, weight_decay=0.1, cautious=True, backend=backend)
    expected = [p.detach().clone() for p in params]
    m, v = ([torch.zeros_like(p) for p in expected] for _ in range(2))
    for t in range(1, 5):
        give(params, t)
        for p, g, m_p, v_p in zip(expected, [p.grad for p in params], m, v):
            m_p += (1 - 0.9) * (g - m_p)
            v_p += (1 - 0.999) * (g * g - v_p)
            r = m_p / (1 - 0.9**t) / ((v_p / (1 - 0.999**t)).sqrt() + 1e-6)
            of_p, of_step = torch.linalg.vector_norm(p), torch.linalg.vector_norm(r + 0.1 * p)
            mask = (r * g > 0).to(p.dtype)
            step = r * mask / mask.mean().clamp(min=1e-3) + 0.1 * p
            p -= LR * step * (of_p / of_step if of_p * of_step > 0 else 1.0)
        made.step()
    # Four steps of two dozen roundings of 1.1e-16.
    close(params, expected, 1e-12)


def test_a_gradient_that_is_not_finite_reaches_the_whole_parameter(backend, device):
    """As in Apex: its norm is no number then; other parameters are as without it."""
    params = [torch.nn.Parameter(torch.ones(50, device=device)) for _ in range(2)]
    made = fusedopt.LAMB(params, lr=LR, backend=backend)
    give(params, 1)
    params[0].grad[3] = float("nan")
    made.step()
    assert params[0].isnan().all() and params[1].isfinite().all()
