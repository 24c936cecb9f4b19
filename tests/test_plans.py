"""Plans made anew at every step, since other parameters have gradients: what happens to a parameter and its state while
no plan looks at them is noticed when its gradient comes back."""

import pytest
import torch
from pairs import close

import fusedopt

SIZES = (3, 700, 20_000, 5, 64)
"""Gathered on a CPU, and not."""


def present(t, k):
    return (t + k) % 3 != 0


def double_a_state(optimizer, p):
    optimizer.state[p]["exp_avg"].mul_(2)


def replace_a_state(optimizer, p):
    optimizer.state[p]["exp_avg"] = torch.full_like(p, 0.5)


def replace_its_memory(optimizer, p):
    optimizer.state[p]["exp_avg_sq"].data = torch.full_like(p, 0.25)


def begin_again(optimizer, p):
    optimizer.state[p].clear()


def set_the_step(optimizer, p):
    optimizer.state[p]["step"].fill_(7)


def move_the_parameter(optimizer, p):
    p.data = p.data.clone()


def copy_all_states(optimizer, p):
    optimizer.load_state_dict(optimizer.state_dict())


ACTS = [None, double_a_state, replace_a_state, replace_its_memory, begin_again, set_the_step, move_the_parameter]
ACTS.append(copy_all_states)


@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize("act", ACTS, ids=lambda act: act.__name__ if act else "nothing")
def test_changes_are_noticed_when_the_gradient_comes_back(act, flatten, backend, device):
    sizes = SIZES if backend == "torch" else SIZES[:2]
    ours, theirs = ([torch.nn.Parameter(torch.ones(n, device=device)) for n in sizes] for _ in range(2))
    # A large eps, so that rounding errors of 1e-7 in the states stay such in the step.
    options = {"lr": 0.1, "eps": 1e-2, "weight_decay": 0.1}
    pair = fusedopt.AdamW(ours, **options, backend=backend, flatten=flatten), torch.optim.AdamW(theirs, **options)
    generator = torch.Generator().manual_seed(0)
    for t in range(9):
        grads = [torch.randn(n, generator=generator).to(device) for n in sizes]
        for params in (ours, theirs):
            for k, (p, g) in enumerate(zip(params, grads)):
                p.grad = g.clone() if present(t, k) else None
        for optimizer in pair:
            optimizer.step()
        if act is not None and t % 2:
            for optimizer, params in zip(pair, (ours, theirs)):
                for k, p in enumerate(params):
                    if not present(t, k) and optimizer.state[p]:
                        act(optimizer, p)
    # float32, 9 steps of 0.1.
    close([p.detach() for p in ours], [p.detach() for p in theirs], 1e-5)
    for p, q in zip(ours, theirs):
        close(
            [pair[0].state[p][key] for key in ("step", "exp_avg")],
            [pair[1].state[q][key] for key in ("step", "exp_avg")],
            1e-5,
        )
