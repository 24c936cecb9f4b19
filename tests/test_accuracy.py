"""Accuracy: how far from float64 the optimizers end, beside torch's own on the same numbers."""

import pytest
import torch
from oracles import oracle_class

import fusedopt

FORGETFUL = {
    "Adam": lambda beta: {"betas": (0.9, beta)},
    "NAdam": lambda beta: {"betas": (0.9, beta)},
    "RMSprop": lambda beta: {"alpha": beta},
    "Adadelta": lambda beta: {"rho": beta},
    "Adan": lambda beta: {"betas": (0.98, 0.92, beta)},
    "AdEMAMix": lambda beta: {"betas": (0.9, beta, 0.9999)},
}
"""Averages of squares of which little is kept."""


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.4])
@pytest.mark.parametrize("name", FORGETFUL)
def test_averages_that_forget(name, beta, backend, device):
    """Small gradients after large ones: hardly anything may be left of a large average of squares, nor of its rounding,
    in which small squares would drown."""
    grads = torch.tensor([[1.0, -3.0, 1e3, 1e-3], [1e-6, -1e-4, 1.0, 1e-6], [1e-5, 1e-6, -1e-4, 2e-6]], device=device)
    options = {"lr": 1.0, "eps": 1e-12, **FORGETFUL[name](beta)}

    def moves(make, dtype, **more):
        p = torch.nn.Parameter(torch.zeros(4, dtype=dtype, device=device))
        optimizer = make([p], **options, **more)
        for g in grads:
            p.data.zero_()
            p.grad = g.to(dtype)
            optimizer.step()
            yield p.detach().double()

    exact = moves(oracle_class(name), torch.float64)
    for ours, wanted in zip(moves(fusedopt.registry[name], torch.float32, backend=backend), exact, strict=True):
        # A dozen roundings, 1 - beta in float32, and what cancels in Adan: 4.6e-6 measured. Without: 1e-2 and more.
        torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=0)
