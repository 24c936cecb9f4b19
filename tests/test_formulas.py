"""The numbers: torch.optim in float64, and the rounding of narrower dtypes."""

from copy import deepcopy

import pytest
import torch
from cases import (
    CLIPS,
    clip_settings,
    every_choice_of_options,
    every_kind_and_backend,
    every_optimizer,
    fewer_options_in_kernels,
    give_gradients,
    interpreter_noise,
    model,
    options_and_backends,
    options_of,
    random,
    some_options_in_kernels,
    stands_for_all,
)
from options import LR, NAMES, OPTIONS, STATEFUL
from oracles import oracle_class
from pairs import Pair
from thinning import ALL, every_pair, every_pair_but

import fusedopt
from fusedopt.blocks import for_threads

pytestmark = interpreter_noise


def scale_of(backend, device, steps=20):
    """The model and the number of steps: Triton's interpreter takes a millisecond per program."""
    return ("tiny", 4) if backend == "triton" and device.type == "cpu" else ("small", steps)


def test_every_optimizer_has_its_options():
    for name in NAMES:
        assert options_of(name)[0] == {}
    assert set(OPTIONS) == set(STATEFUL) == set(NAMES)


@options_and_backends(stands_for_all)
def test_every_option_equals_torch(name, options, backend, device):
    """Long for the defaults, those with most states and the last. The kernels get the same numbers as the fallback, and
    so these are all that the interpreter takes."""
    kind, steps = scale_of(backend, device, steps=50 if stands_for_all(name, options) else 25)
    pair = Pair(name, options, kind, device=device, backend=backend, start=0)
    pair.step(steps)
    pair.check()


@every_choice_of_options
def test_options_equal_torch_on_several_threads(name, options, monkeypatch):
    """Where small parameters are gathered for every rule: on one thread some are updated as a list. The defaults, those
    with most states and the last; with FUSEDOPT_CASES=all every option."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    pair = Pair(name, options, "small", start=0)
    pair.step(10)
    pair.check()


@fewer_options_in_kernels
def test_options_equal_torch_flat_and_clipped(name, options, backend, device):
    """The same options in the fallback, and in the interpreter two of them."""
    kind, steps = scale_of(backend, device)
    pair = Pair(
        name, options, kind, device=device, backend=backend, start=0, flatten=True, **clip_settings("both", kind)
    )
    pair.step(steps)
    pair.check()


@every_pair
@every_kind_and_backend
@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize("clip", CLIPS)
def test_clipping_equals_torch(name, clip, flatten, backend, device):
    kind, steps = scale_of(backend, device)
    pair = Pair(name, None, kind, device=device, backend=backend, start=0, flatten=flatten, **clip_settings(clip, kind))
    pair.step(steps)
    pair.check()
    # A limit that never binds would test nothing.
    assert pair.clipped == (clip != "none")


@every_optimizer
@pytest.mark.parametrize(
    ("options", "threads", "clip"),
    [({}, 2, "both"), (None, 1, "none"), ({}, 1, "none"), (None, 2, "none"), (None, 1, "both")][: None if ALL else 2],
    ids=lambda value: {"{}": "defaults", "None": "stateful"}.get(str(value), str(value)),
)
def test_large_parameters_equal_torch(name, options, threads, clip, device):
    """Blocks and their ends, tensors that are not gathered, and more threads than one; with FUSEDOPT_CASES=all both
    options with one thread and with two."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        pair = Pair(name, options, "large", device=device, start=0, **clip_settings(clip, "large"))
        pair.step(4)
        pair.check()
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("threads", "block"), [(1, 2**17), (4, 2**17), (16, 2**19), (96, 96 * 2**15)])
def test_blocks_leave_no_thread_idle(threads, block, monkeypatch):
    """torch gives each thread 32768 elements."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert for_threads(2**17) == block


@every_pair_but("options")
@some_options_in_kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_16_bit_parameters_are_computed_in_float32_and_rounded_once(name, options, dtype, backend, device):
    """Each step against one step of torch.optim in float64 from the same 16-bit numbers."""
    kind, steps = scale_of(backend, device)[0], 3
    options = {"lr": LR, **options}
    params = model(kind, dtype, device)
    optimizer = fusedopt.registry[name](params, backend=backend, **options)
    for number in range(2, 2 + steps):  # large gradients first, so that amsgrad's maximum is not the latest
        give_gradients(params, number)
        exact = [torch.nn.Parameter(p.detach().double()) for p in params]
        for p, q in zip(params, exact):
            q.grad = None if p.grad is None else p.grad.double()
        oracle = oracle_class(name)(exact, **options, foreach=False)
        oracle.load_state_dict(deepcopy(optimizer.state_dict()))  # torch would share the step counts
        before = tensors(params, optimizer)
        optimizer.step()
        oracle.step()
        for key, new in tensors(params, optimizer).items():
            assert_rounded_once(new, tensors(exact, oracle)[key], before.get(key, new), f"step {number}, {key}")


def tensors(params, optimizer):
    """Copies of every parameter and state, by (number, name)."""
    found = {(k, "param"): p.detach().clone() for k, p in enumerate(params)}
    for k, p in enumerate(params):
        states = optimizer.state.get(p, {})
        found |= {(k, key): s.clone() for key, s in states.items() if key != "step"}
    return found


def assert_rounded_once(new, exact, old, where):
    """``new`` is ``exact`` rounded to 16 bits, or what float32's own error can make of it.

    float32 is off by 2^-24 per operation, and a dozen of them (centered RMSprop cancels a bit or two)
    by 2^-19 of the terms, which are as large as the old and the new value together. Rounding twice, or
    16-bit arithmetic, errs by 2^-9 or 2^-12.
    """
    slack = 2**-19 * (old.double().abs() + exact.abs())
    low, high = (exact - slack).to(new.dtype), (exact + slack).to(new.dtype)
    wrong = ~((low <= new) & (new <= high))
    # Both overflow alike.
    wrong &= ~(new.isnan() & exact.to(new.dtype).isnan())
    assert not wrong.any(), f"{where}: {new[wrong][:3]} instead of {exact[wrong][:3]}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("stateful", [False, True])
@every_optimizer
def test_large_16_bit_parameters_are_what_float32_ones_round_to(name, stateful, dtype):
    """Several blocks with an end, clipped, beside float32 parameters that begin every step with the same numbers: bit
    for bit, but where norms that differ by 1e-7 make a value fall on the other side of a tie, which is 2^-9 wide."""
    options = STATEFUL[name] if stateful else {} if name == "Rprop" else {"weight_decay": 0.1, "maximize": True}
    narrow = [torch.nn.Parameter(random((70_001,), 1).to(dtype)), torch.nn.Parameter(random((130, 131), 2).to(dtype))]
    wide = [torch.nn.Parameter(p.detach().float()) for p in narrow]
    ours, reference = (fusedopt.registry[name](params, lr=1e-2, **options) for params in (narrow, wide))
    for step in range(4):
        for k, (p, q) in enumerate(zip(narrow, wide)):
            p.grad = (random(tuple(p.shape), 10 * step + k) * 0.1).to(dtype)
            q.grad = p.grad.float()
        for optimizer in (ours, reference):
            optimizer.clip_grad_norm_(20.0)
            optimizer.step()
        for p, q in zip(narrow, wide):
            pairs = [(p.detach(), q.detach())]
            pairs += [
                (ours.state[p][key], reference.state[q][key]) for key in ours.state[p] if ours.state[p][key].dim()
            ]
            for got, expected in pairs:
                assert (got != expected.to(dtype)).float().mean() < 1e-3
                expected.copy_(got)


def test_the_first_step_is_exact_to_a_rounding(backend, device):
    """Where beta2 is close to 1, a bias correction from float32 powers would be off by 1e-5. Parameters that are zero
    show the update as it is, with less than five roundings of 6e-8; torch's own has four."""
    generator = torch.Generator().manual_seed(0)
    g = torch.randn(700, generator=generator, dtype=torch.float64)
    for name in ("Adam", "AdamW", "NAdam", "Adamax"):
        p, exact = (
            torch.nn.Parameter(torch.zeros(700, dtype=d, device=device)) for d in (torch.float32, torch.float64)
        )
        p.grad, exact.grad = g.float().to(device), g.float().double().to(device)
        fusedopt.registry[name]([p], lr=1.0, betas=(0.9, 0.999), eps=0.0, backend=backend).step()
        getattr(torch.optim, name)([exact], lr=1.0, betas=(0.9, 0.999), eps=0.0, foreach=False).step()
        error = ((p.double() - exact) / exact).abs().max()
        assert error < 5 * 2**-24, name


@pytest.mark.usefixtures("needs_triton")
def test_fifty_groups_are_one_launch(device, monkeypatch):
    """Of layer-wise learning rates, some parameters in two dtypes: one update for each dtype."""
    from fusedopt.launch import Launches

    launched, launch = [], Launches.__call__

    def counted(self, kernel, *args, **constants):
        launched.append(kernel.__name__ if hasattr(kernel, "__name__") else str(kernel))
        launch(self, kernel, *args, **constants)

    monkeypatch.setattr(Launches, "__call__", counted)
    for dtypes, launches in (((torch.float32,), 1), ((torch.float32, torch.bfloat16), 2)):
        params = [torch.nn.Parameter(torch.ones(3, dtype=dtypes[k % len(dtypes)], device=device)) for k in range(50)]
        groups = [{"params": [p], "lr": 0.1 / (1 + k), "weight_decay": 0.01 * (k % 3)} for k, p in enumerate(params)]
        optimizer = fusedopt.AdamW(groups, backend="triton")
        for p in params:
            p.grad = torch.ones_like(p)
        launched.clear()
        optimizer.step()
        assert len(launched) == launches, launched
