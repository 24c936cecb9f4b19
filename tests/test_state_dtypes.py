"""How far every rule's states may be stored in fewer bits: its steps beside those with float32 states, on noisy
gradients of sizes that differ by a hundred times within a block, half of which begin late."""

import functools

import torch
from cases import every_optimizer
from options import STATEFUL

import fusedopt

STEPS, LATE, LAST = 400, 200, 100

CODED = {"Adagrad": 1e-6, "Rprop": 1e-6, "ASGD": 1e-6, "Adadelta": 0.05, "RMSprop": 0.05, "SGD": 0.05, "Adamax": 0.3}
"""How far the steps with 8-bit states may differ, as a part of their size; measured 0.004 to 0.17, where the sensitive
states are float32. If those were coded too, the late half of Adagrad would be off by 0.7, and Rprop's steps by 0.8."""

COARSE = 0.8
"""For the others, whose first moment rounds to nothing where gradients are small among their block's: measured 0.25 to
0.6, and no more than noise in training (bench/convergence.py)."""


@functools.cache
def last_steps(name, state_dtype):
    """How far parameters go in the last steps, and the averages of parameters."""
    generator = torch.Generator().manual_seed(0)
    size = torch.exp(torch.randn(4096, generator=generator))
    mean = 0.3 * size * torch.randn(4096, generator=generator)
    p = torch.nn.Parameter(torch.zeros(4096))
    options = STATEFUL[name] | ({"t0": 10} if name == "ASGD" else {})
    optimizer = fusedopt.registry[name]([p], lr=1e-3, state_dtype=state_dtype, backend="torch", **options)
    for t in range(STEPS):
        if t == STEPS - LAST:
            start = p.detach().clone()
        p.grad = mean + size * torch.randn(4096, generator=generator)
        if t < LATE:
            p.grad[::2] = 0
        optimizer.step()
    averages = [optimizer.state_dict()["state"][0][key] for key in optimizer.rule(optimizer.param_groups[0]).averages]
    return [p.detach() - start, *averages]


def errors(name, state_dtype, half):
    """Of the elements that begin late (0) or at once (1)."""
    exact = last_steps(name, None)
    return [((a - b)[half::2].norm() / b[half::2].norm()).item() for a, b in zip(last_steps(name, state_dtype), exact)]


@every_optimizer
def test_bfloat16(name):
    """Rounded stochastically, every state is right in the mean: measured 0.03 at most, and to the nearest a second
    moment would not move at all."""
    assert max(errors(name, torch.bfloat16, 0) + errors(name, torch.bfloat16, 1)) < 0.05


@every_optimizer
def test_8_bits(name):
    bound = CODED.get(name, COARSE)
    assert max(errors(name, "8bit", 1)) < bound
    if name in CODED:
        assert max(errors(name, "8bit", 0)) < bound
