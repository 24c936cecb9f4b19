"""Accelerate in one process: both clips, and save_state with flattened parameters, of which none may be missing."""

import pytest
import torch

accelerate = pytest.importorskip("accelerate")

import fusedopt  # noqa: E402

OPTIONS = {"lr": 1e-2, "weight_decay": 0.1, "eps": 1e-4}


def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(5, 17), torch.nn.Tanh(), torch.nn.Linear(17, 3))


def train(accelerator, model, optimizer, steps, clip=None):
    for number in range(*steps):
        x = torch.randn(8, 5, generator=torch.Generator().manual_seed(number))
        optimizer.zero_grad()
        accelerator.backward(model(x).square().mean())
        if clip is not None:
            accelerator.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()


def prepared(cls, **settings):
    accelerator = accelerate.Accelerator(cpu=True)
    model = network()
    return accelerator, *accelerator.prepare(model, cls(model.parameters(), **OPTIONS, **settings))


@pytest.mark.parametrize("inside", [False, True], ids=["outside", "inside"])
def test_as_torch_does(inside):
    expected = prepared(torch.optim.AdamW)
    train(*expected, (0, 6), clip=0.05)
    run = prepared(fusedopt.AdamW, **({"max_grad_norm": 0.05} if inside else {}))
    train(*run, (0, 6), clip=None if inside else 0.05)
    for p, q in zip(run[1].parameters(), expected[1].parameters(), strict=True):
        # float32, 6 steps of 1e-2.
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)


@pytest.mark.parametrize("flatten", [False, True])
def test_saved_and_loaded(flatten, tmp_path):
    run = prepared(fusedopt.AdamW, max_grad_norm=0.05, flatten=flatten)
    train(*run, (0, 3))
    run[0].save_state(str(tmp_path))
    train(*run, (3, 6))
    other = prepared(fusedopt.AdamW, max_grad_norm=0.05, flatten=flatten)
    other[0].load_state(str(tmp_path))
    train(*other, (3, 6))
    for p, q in zip(run[1].parameters(), other[1].parameters(), strict=True):
        assert torch.equal(p, q)
