"""States that follow the new parameter: a <- a + weight (p - a), in the same pass as the update."""

import pytest
import torch
from cases import clip_settings, give_gradients, interpreter_noise, kinds, model
from options import LR
from pairs import close, same_bits
from thinning import every_pair

import fusedopt
from fusedopt.adam import AMSGRAD
from fusedopt.sgd import PLAIN

AVERAGES = ("slow", "fast")
WEIGHTS = {0: (1.0, 1.0), 1: (0.1, 1.0), 2: (0.01, 0.75)}
"""By step: the first copies, later ones mix."""


def averaged(cls, rule):
    """``cls`` with two averages of each parameter among its states."""
    with_averages = rule._replace(averages=AVERAGES)

    class Averaged(cls):
        number = 0

        def rule(self, group):
            return with_averages

        def update(self, group, t):
            return super().update(group, t)._replace(averages=WEIGHTS[self.number])

    return Averaged


@every_pair
@interpreter_noise
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("flatten", [False, True], ids=["in place", "flatten"])
@pytest.mark.parametrize(("cls", "rule"), [(fusedopt.SGD, PLAIN), (fusedopt.AdamW, AMSGRAD)])
def test_averages_follow_the_parameter(cls, rule, flatten, dtype, backend, device):
    """In 16 bits, of the parameter before it is rounded."""
    for kind in kinds(backend, device):
        settings = {"backend": backend, "flatten": flatten, "lr": LR, **clip_settings("both", kind)}
        params, plain = model(kind, dtype, device), model(kind, dtype, device)
        made, reference = averaged(cls, rule)(params, **settings), cls(plain, **settings)
        expected = {}
        for number in WEIGHTS:
            made.number = number
            give_gradients(params, number + 5)
            give_gradients(plain, number + 5)
            made.step()
            reference.step()
            assert all(map(same_bits, params, plain))
            for p in params:
                old = expected.get(p, [torch.zeros_like(p).double()] * 2)
                if p.grad is not None:
                    expected[p] = [a + w * (p.detach().double() - a) for a, w in zip(old, WEIGHTS[number])]
        # Two roundings of float32 per step; bfloat16 rounds parameters below 4, and averages, at 2^-8.
        bound = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2**-6}[dtype]
        for p in params:
            state = made.state[p]
            assert list(state) == [*(["step"] if cls.counts_steps else []), *rule.states, *AVERAGES]
            assert all(
                (state[key].dtype == dtype and state[key].stride() == p.stride()) or has_gaps(p) for key in AVERAGES
            )
            close([state[key].double() for key in AVERAGES], expected[p], bound)


def has_gaps(p):
    return not torch.ops.aten.is_non_overlapping_and_dense(p)


@interpreter_noise
def test_a_copy_is_exact(backend, device):
    """Also of what an average of infinities or of other sizes would spoil."""
    values = torch.tensor([1.0, 1e30, -0.0, 3.0], device=device)
    (p,) = params = [torch.nn.Parameter(values.clone())]
    made = averaged(fusedopt.SGD, PLAIN)(params, lr=0.0, backend=backend)
    p.grad = torch.ones_like(p)
    made.step()
    for key in AVERAGES:
        made.state[p][key].fill_(torch.inf)
    made.step()
    assert all(torch.equal(made.state[p][key], values) for key in AVERAGES)
