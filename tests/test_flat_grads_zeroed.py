"""``flat_grads="zeroed"``: the step leaves zeros in place of the gradients."""

import pytest
import torch
from cases import interpreter_noise, label, laid_out
from graphs import capture
from pairs import assert_same, same_bits, snapshot

import fusedopt
from fusedopt import flat_grads

SETTINGS = [
    {},
    {"max_grad_norm": 0.1, "skip_nonfinite": True},
    {"max_grad_norm": 0.1, "skip_nonfinite": True, "launches": 1},
    {"skip_nonfinite": True, "launches": 1, "track": "total"},
    {"skip_nonfinite": True, "track": "parameters", "ema_decay": 0.9, "flatten": True},
    {"adaptive_grad_clip": 0.01, "cautious": True},
    {"max_grad_norm": 0.1, "skip_nonfinite": True, "master": "split", "state_dtype": "8bit"},
    {"capturable": True, "max_grad_norm": 0.1, "skip_nonfinite": True},
]


class Run:
    """An optimizer of three parameters, one with gaps and one long enough for 8-bit states."""

    def __init__(self, backend, device, flat, **settings):
        dtype = torch.bfloat16 if "master" in settings else torch.float32
        if backend == "torch":
            settings.pop("launches", None)
        if backend == "torch" and settings.pop("capturable", False):
            pytest.skip("no kernels")
        shapes = {"": (4100,), "transposed": (6, 4), "gaps": (5, 4)}
        generator = torch.Generator().manual_seed(1)
        self.params = [
            torch.nn.Parameter(laid_out(torch.randn(shape, generator=generator).to(device, dtype), layout))
            for layout, shape in shapes.items()
        ]
        self.opt = fusedopt.AdamW(self.params, lr=0.1, flat_grads=flat, backend=backend, **settings)
        self.opt.zero_grad()

    def backward(self, number, broken=False):
        factor = float("inf") if broken else 0.1 * number
        sum((p * p).sum() * factor for p in self.params).backward()

    def grads_are_zero(self):
        return not any(p.grad.any() for p in self.params) and not any(b.any() for b in self.opt._flat_grads.buffers)


def fills(monkeypatch):
    """The number of calls that fill buffers, in a list."""
    found = [0]
    original = flat_grads.FlatGrads._fill

    def fill(self):
        found[0] += 1
        original(self)

    monkeypatch.setattr(flat_grads.FlatGrads, "_fill", fill)
    return found


@interpreter_noise
@pytest.mark.parametrize("backend", ["torch", "triton"], indirect=True)
@pytest.mark.parametrize("settings", SETTINGS, ids=label)
def test_a_step_leaves_zeros(settings, backend, device, monkeypatch):
    """After every step, a skipped one too, and the kernels do it by themselves; the same bits as without."""
    zeroed, kept = (Run(backend, device, flat, **settings) for flat in ("zeroed", True))
    count = fills(monkeypatch)
    for number in range(1, 6):
        broken = number == 4 and settings.get("skip_nonfinite", False)
        for run in (zeroed, kept):
            run.backward(number, broken)
            run.opt.step()
        assert zeroed.grads_are_zero() and not kept.grads_are_zero()
        assert_same(snapshot(zeroed.opt), snapshot(kept.opt))
        if zeroed.opt.track is not None:
            assert all(map(same_bits, zeroed.opt.metrics, kept.opt.metrics))
        before = count[0]
        zeroed.opt.zero_grad()
        assert count[0] == before
        kept.opt.zero_grad()
    # Those of the other optimizer, and of torch's steps.
    assert count[0] == 5 + (5 if backend == "torch" else 0)


@pytest.mark.parametrize("backend", ["torch", "triton"], indirect=True)
def test_zeros_that_were_written_to_are_filled_again(backend, device):
    run = Run(backend, device, "zeroed")
    run.backward(1)
    run.opt.step()
    run.backward(2)
    run.opt.zero_grad()
    assert run.grads_are_zero()
    run.backward(1)
    run.opt.step()
    run.opt.zero_grad()
    # Written to unseen, as by a graph's replay: the step's promise was used up.
    run.params[0].grad.data.fill_(1.0)
    run.opt.zero_grad()
    assert run.grads_are_zero()


@pytest.mark.parametrize("backend", ["torch", "triton"], indirect=True)
def test_gradients_elsewhere_are_left_alone(backend, device):
    """One that somebody replaced, a missing one, all after model.zero_grad(): zero_grad() brings them back."""
    run = Run(backend, device, "zeroed")
    run.backward(1)
    run.opt.step()
    run.backward(1)
    own = run.params[0].grad = run.params[0].grad.clone()
    run.params[1].grad = None
    expected = own.clone()
    run.opt.step()
    assert torch.equal(own, expected) and not run.params[2].grad.any()
    run.opt.zero_grad()
    assert run.grads_are_zero() and run.params[0].grad is not own
    run.backward(1)
    run.opt.step()
    assert run.grads_are_zero()
    for p in run.params:
        p.grad = None
    run.backward(1)
    run.opt.step()
    assert all(p.grad.any() for p in run.params)
    # Its layout was changed in place: the kernel reads a copy.
    run.opt.zero_grad()
    run.params[1].data = run.params[1].data.clone(memory_format=torch.contiguous_format)
    run.backward(1)
    run.opt.step()
    run.backward(1)
    run.opt.step()
    run.opt.zero_grad()
    assert run.grads_are_zero()


@pytest.mark.parametrize("backend", ["torch", "triton"], indirect=True)
def test_without_any_zero_grad(backend, device):
    """The first step puts them into the buffer, all others find them there."""
    run, asked = (Run(backend, device, "zeroed") for _ in range(2))
    for p in run.params:
        p.grad = None
    run.opt = fusedopt.AdamW(run.params, lr=0.1, flat_grads="zeroed", backend=backend)
    for number in range(1, 4):
        for each in (run, asked):
            each.backward(number)
            each.opt.step()
        assert run.grads_are_zero() and len(run.opt._flat_grads.buffers) == 1
        asked.opt.zero_grad()
    assert_same(snapshot(run.opt), snapshot(asked.opt))


def test_autograd_knows_that_a_step_zeroed_them(backend, device):
    run = Run(backend, device, "zeroed")
    for _ in range(2):
        run.backward(1)
        squares = (run.params[0].grad * torch.ones(4100, device=device, requires_grad=True)).sum()
        run.opt.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            squares.backward()


def test_an_error_in_the_step_keeps_gradients(backend, device):
    run = Run(backend, device, "zeroed")
    run.backward(1)
    run.opt.step()
    run.backward(1)
    run.opt.param_groups[0]["lr"] = float("nan")
    with pytest.raises(ValueError, match="nan"):
        run.opt.step()
    assert not run.grads_are_zero()
    run.opt.param_groups[0]["lr"] = 0.1
    run.opt.flat_grads = True
    run.opt.step()
    assert not run.grads_are_zero()


@pytest.mark.usefixtures("needs_triton")
def test_in_a_graph(device, monkeypatch):
    """The graph's step leaves zeros at every replay; zero_grad() behind a replay, or within a graph, fills."""
    run = Run("triton", device, "zeroed", capturable=True, max_grad_norm=0.1)
    for _ in range(2):
        run.backward(1)
        run.opt.step()
    count = fills(monkeypatch)
    with capture(monkeypatch, run.opt._engine.executors) as graph:
        run.opt.step()
    assert count == [0]
    for _ in range(2):
        with torch.no_grad():
            for p in run.params:
                p.grad.fill_(1.0)
        before = run.params[0].detach().clone()
        graph.replay()
        assert run.grads_are_zero() and not torch.equal(run.params[0], before)
    run.params[0].grad.data.fill_(1.0)
    run.opt.zero_grad()
    assert run.grads_are_zero() and count == [1]
    run.backward(1)
    run.opt.step()
    with capture(monkeypatch, run.opt._engine.executors):
        run.opt.zero_grad()
    assert count == [2]
