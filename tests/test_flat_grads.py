"""``flat_grads=True``: gradients that stay where they are."""

import copy
import pickle

import pytest
import torch
from cases import every_kind_and_backend, interpreter_noise, label, laid_out
from graphs import capture
from pairs import assert_same, same_bits, snapshot

import fusedopt
from fusedopt import flat_grads


def network(dtype=torch.float32):
    torch.manual_seed(0)
    layers = torch.nn.Sequential(torch.nn.Conv2d(2, 4, 3), torch.nn.Flatten(), torch.nn.Linear(36, 3))
    layers[0].weight = torch.nn.Parameter(layers[0].weight.detach().to(memory_format=torch.channels_last))
    return layers.to(dtype)


def backward(layers, number):
    generator = torch.Generator().manual_seed(number)
    x = torch.randn(6, 2, 5, 5, generator=generator).to(layers[2].weight.dtype)
    layers(x).square().mean().backward()


def addresses(layers):
    return [p.grad.data_ptr() for p in layers.parameters()]


@every_kind_and_backend
def test_trains_as_without(name, backend):
    ended = []
    for flat in ("zeroed", True, False):
        layers = network()
        optimizer = fusedopt.registry[name](
            layers.parameters(), lr=0.01, flat_grads=flat, backend=backend, max_grad_norm=0.1
        )
        places = []
        for number in range(6):
            optimizer.zero_grad(set_to_none=number % 2 == 0)
            for part in range(2):
                backward(layers, 2 * number + part)
            places.append(addresses(layers))
            optimizer.step()
        assert not flat or places.count(places[0]) == len(places)
        ended.append([p.detach() for p in layers.parameters()])
    # backward adds to zeros what it otherwise puts there: the same number.
    for others in ended[1:]:
        assert all(map(torch.equal, ended[0], others))


def test_one_buffer_holds_them_and_zeros():
    layers = network()
    optimizer = fusedopt.AdamW(layers.parameters(), flat_grads=True)
    assert [float(p.grad.abs().sum()) for p in layers.parameters()] == [0.0] * 4
    assert all(p.grad.stride() == p.stride() for p in layers.parameters())
    (buffer,) = optimizer._flat_grads.buffers
    backward(layers, 0)
    inside = [buffer.data_ptr() <= p.grad.data_ptr() < buffer.data_ptr() + buffer.nbytes for p in layers.parameters()]
    assert all(inside) and all(p.grad.abs().sum() > 0 for p in layers.parameters())
    optimizer.zero_grad()
    assert not buffer.any()


def test_autograd_knows_that_they_were_zeroed():
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = fusedopt.SGD([p], lr=0.1, flat_grads=True)
    (p * 2).sum().backward()
    squares = (p.grad * torch.ones(3, requires_grad=True)).sum()
    optimizer.zero_grad()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        squares.backward()


def test_what_others_do_to_gradients_and_parameters():
    """model.zero_grad(), another dtype, a new group, frozen parameters: the next zero_grad() brings them back."""
    layers = network()
    optimizer = fusedopt.SGD(layers[0].parameters(), lr=0.1, flat_grads=True)
    twin = copy.deepcopy(layers)
    theirs = torch.optim.SGD(twin[0].parameters(), lr=0.1)

    def both(number, change=lambda layers, optimizer: None):
        for model, opt in ((layers, optimizer), (twin, theirs)):
            opt.zero_grad()
            change(model, opt)
            backward(model, number)
            opt.step()
        assert all(torch.allclose(p, q, rtol=1e-6, atol=0) for p, q in zip(layers.parameters(), twin.parameters()))

    both(0)
    both(1, lambda model, opt: model.zero_grad())
    both(2)
    first = addresses(layers[0])
    both(3, lambda model, opt: model.double())
    both(4)
    assert [p.grad.dtype for p in layers[0].parameters()] == [torch.float64] * 2 and addresses(layers[0]) != first
    both(5, lambda model, opt: opt.add_param_group({"params": list(model[2].parameters())}))
    both(6)
    assert len(optimizer._flat_grads.given) == 4
    both(7, lambda model, opt: model[0].bias.requires_grad_(False))
    both(8)


def test_a_part_of_a_larger_buffer_is_left_there():
    bucket = torch.ones(10)
    p = torch.nn.Parameter(torch.ones(4))
    optimizer = fusedopt.SGD([p], lr=0.1, flat_grads=True)
    p.grad = lent = bucket[3:7]
    optimizer.step()
    assert torch.equal(p, torch.full((4,), 0.9))
    optimizer.zero_grad()
    assert p.grad is lent and bucket.tolist() == [1.0] * 3 + [0.0] * 4 + [1.0] * 3


def test_copies_and_the_setting():
    layers = network()
    optimizer = fusedopt.AdamW(layers.parameters(), flat_grads=True)
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        other.zero_grad()
        params = other.param_groups[0]["params"]
        assert other.flat_grads and all(p.grad is not None for p in params)
        assert not {p.grad.data_ptr() for p in params} & set(addresses(layers))
    optimizer.flat_grads = False
    optimizer.zero_grad()
    assert all(p.grad is None for p in layers.parameters())
    for wrong in (1, "zero", None):
        with pytest.raises(TypeError, match="flat_grads must be True, False or 'zeroed', got"):
            optimizer.flat_grads = wrong
    converted = fusedopt.convert(torch.optim.AdamW(layers.parameters()), flat_grads=True)
    converted.zero_grad()
    assert all(p.grad is not None for p in layers.parameters())


@pytest.mark.parametrize("flat", [True, "zeroed"])
def test_not_with_gradient_release(flat):
    layers = network()
    optimizer = fusedopt.SGD(layers.parameters(), lr=0.1, flat_grads=flat)
    with pytest.raises(RuntimeError, match="flat_grads"):
        fusedopt.enable_gradient_release(layers, optimizer)


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

    def __init__(self, backend, flat, **settings):
        dtype = torch.bfloat16 if "master" in settings else torch.float32
        if backend == "torch":
            settings.pop("launches", None)
        if backend == "torch" and settings.pop("capturable", False):
            pytest.skip("no kernels")
        shapes = {"": (4100,), "transposed": (6, 4), "gaps": (5, 4)}
        generator = torch.Generator().manual_seed(1)
        self.params = [
            torch.nn.Parameter(laid_out(torch.randn(shape, generator=generator).to(dtype), layout))
            for layout, shape in shapes.items()
        ]
        self.opt = fusedopt.AdamW(self.params, lr=0.1, flat_grads=flat, backend=backend, **settings)

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
def test_a_step_leaves_zeros(settings, backend, monkeypatch):
    """After every step, a skipped one too, and the kernels do it by themselves; the same bits as without."""
    zeroed, kept = (Run(backend, flat, **settings) for flat in ("zeroed", True))
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
def test_zeros_that_were_written_to_are_filled_again(backend, monkeypatch):
    run = Run(backend, "zeroed")
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
def test_gradients_elsewhere_are_left_alone(backend):
    """One that somebody replaced, a missing one, all after model.zero_grad(): zero_grad() brings them back."""
    run = Run(backend, "zeroed")
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


def test_autograd_knows_that_a_step_zeroed_them(backend):
    run = Run(backend, "zeroed")
    for _ in range(2):
        run.backward(1)
        squares = (run.params[0].grad * torch.ones(4100, requires_grad=True)).sum()
        run.opt.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            squares.backward()


def test_an_error_in_the_step_keeps_gradients(backend):
    run = Run(backend, "zeroed")
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
def test_in_a_graph(monkeypatch):
    """The graph's step leaves zeros at every replay; zero_grad() behind a replay, or within a graph, fills."""
    run = Run("triton", "zeroed", capturable=True, max_grad_norm=0.1)
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
