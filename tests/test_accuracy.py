"""Accuracy: how far from float64 the optimizers end, beside torch's own on the same numbers (DESIGN.md, decision 18).

Cautious steps jump where a number changes its sign: test_kernels.py compares them step by step.
"""

import math
from pathlib import Path

import pytest
import torch
from accuracy import OURS_ALONE, SIZE, STEPS, error, exact, least_error, ours, problem, theirs, usual
from cases import KINDS, every_optimizer, every_option, interpreter_noise
from options import NAMES
from oracles import oracle_class
from rule_cases import CASES
from stored_training import EXACT, MASTERS
from thinning import ALL

import fusedopt

pytestmark = interpreter_noise

AS_TORCH = 1.05
"""How much larger than torch's the root mean square of errors may be: roundings differ, and with them chance, by about
1 % for as many elements. Measured 1.02 at most; a number that loses a bit more than torch's doubles it."""


SETTINGS = {key for _, _, settings in OURS_ALONE.values() for key in settings} | {"bias_correction"}


@pytest.fixture
def whole_tiles(monkeypatch, needs_triton, device):
    """One program instead of many: the interpreter's time goes by programs."""
    if device.type == "cpu":
        from fusedopt.kernels import tuning

        monkeypatch.setitem(tuning.TABLE, "interpreter", tuning.Tuning(block=SIZE))


@every_option
def test_float32(name, options):
    """The fallback on a CPU, for which it is made: a GPU without kernels is left to torch.optim's own step."""
    check_float32(name, options, "cpu", "torch")


@pytest.mark.parametrize("case", [case for case in CASES if not CASES[case][1].keys() & SETTINGS])
def test_float32_in_kernels(case, whole_tiles, device):
    check_float32(*CASES[case], device, "triton")


def check_float32(name, options, device, backend):
    options = {key: value for key, value in options.items() if key != "lr"}
    numbers = problem(torch.float32)
    wanted = exact(name, options, numbers)
    _, p = ours(name, numbers, torch.float32, device, backend=backend, **options)
    assert error(p, wanted) <= AS_TORCH * least_error(name, options, numbers, torch.float32, wanted)


@pytest.mark.parametrize("formula", OURS_ALONE)
def test_formulas_that_torch_lacks(formula, backend, whole_tiles, device):
    """No further from themselves in float64 than torch's nearest formula is from itself."""
    name, options, more = OURS_ALONE[formula]
    numbers = problem(torch.float32)
    _, wanted = ours(name, numbers, torch.float64, backend="torch", **options, **more)
    _, p = ours(name, numbers, torch.float32, device, backend=backend, **options, **more)
    least = least_error(name, options, numbers, torch.float32, exact(name, options, numbers))
    assert error(p, wanted) <= AS_TORCH * least


FORMS = [(None, None), *((master, torch.float32) for master in MASTERS[1:])]
FEWER_BITS = [(None, torch.bfloat16), (None, "8bit"), ("split", torch.bfloat16), ("split", "8bit")]
"""Of states, than torch keeps for float16 parameters."""

CODES = 2
"""A code is a 254th of the largest number of its block, a bfloat16 a 256th of itself. Measured 1.7 at most."""


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, torch.bfloat16) for name in NAMES] + [(name, torch.float16) for name in (NAMES if ALL else KINDS)],
    ids=str,
)
def test_16_bit_parameters(name, dtype):
    """In every form, against what torch makes of such parameters and states, and in float32."""
    numbers, options = problem(dtype), usual(name)[-1]
    wanted = exact(name, options, numbers)
    narrow = least_error(name, options, numbers, dtype, wanted)
    wide = AS_TORCH * error(theirs(name, options, numbers, torch.float32, foreach=False), wanted)
    size = error(torch.zeros(SIZE), wanted)
    for master, state_dtype in FORMS + (FEWER_BITS if dtype is torch.bfloat16 else []):
        if dtype is torch.float16 and master in ("split", "split8"):
            continue  # refused
        made, p = ours(name, numbers, dtype, backend="torch", master=master, state_dtype=state_dtype, **options)
        (value,) = made.master_state_dict().values()
        if state_dtype == "8bit":
            bound = CODES * narrow
        elif master == "stochastic":
            # Twice the variance. And what hardly moves is safe where it stands: a random walk takes steps of 2^-8.
            bound = AS_TORCH * max(2**0.5 * narrow, (size * 2**-8 * narrow) ** 0.5)
        elif state_dtype is torch.float32 and master in EXACT:
            bound = wide
        elif state_dtype is torch.float32 and master is not None:
            bound = wide + STEPS**0.5 * 2**-16 * size  # 16 significant bits, rounded at each step
        else:
            bound = AS_TORCH * narrow
        assert error(value, wanted) <= bound, f"{master}, {state_dtype}"
        # Nothing is lost on the way to the parameter but what one rounding takes.
        assert error(p, wanted) <= bound + AS_TORCH * error(wanted.to(dtype), wanted), f"{master}, {state_dtype}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1.0, 1e30])
def test_norm(dtype, scale, device):
    """torch's own is off by 1e-5 at a million elements of float32, and is 0 or infinite at the ends. The kernels':
    test_norm_is_exact and its neighbours in test_kernel_norm.py."""
    generator = torch.Generator().manual_seed(0)
    for sizes in ((3,) * 50, (1000,), (30_000, 1), (10**6,)):
        grads = [(torch.randn(n, generator=generator) * scale).to(dtype) for n in sizes]
        wanted = math.sqrt(sum((g.double() / scale).square().sum().item() for g in grads)) * scale
        params = [torch.nn.Parameter(torch.zeros_like(g, device=device)) for g in grads]
        for p, g in zip(params, grads):
            p.grad = g.to(device)
        optimizer = fusedopt.SGD(params, lr=0.0, max_grad_norm=1.0, backend="torch")
        optimizer.step()
        # One rounding of the result and one of each row of 1024, in float32 of sums of 16-bit squares too.
        bound = 1e-14 if dtype is torch.float64 else 3e-7
        assert abs(optimizer.grad_norm.item() / wanted - 1) <= bound, sizes


@every_optimizer
def test_the_documentation_shows_the_errors_of(name):
    page = (Path(__file__).parent.parent / "docs" / "precision.md").read_text()
    table = page[page.index("<!-- made by bench/precision.py") : page.index("<!-- end -->")]
    assert f"\n| {name} |" in table or f"\n| {name}(" in table


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

    found = moves(fusedopt.registry[name], torch.float32, backend=backend)
    for move, wanted in zip(found, moves(oracle_class(name), torch.float64), strict=True):
        # A dozen roundings, 1 - beta in float32, and what cancels in Adan: 4.6e-6 measured. Without: 1e-2 and more.
        torch.testing.assert_close(move, wanted, rtol=1e-5, atol=0)


def test_infinite_parameters_of_asgd(backend, device):
    """As with torch's foreach: its for-loop keeps them, and is off by more where all is finite."""
    params = [torch.nn.Parameter(torch.ones(3, device=device)) for _ in range(2)]
    optimizers = fusedopt.ASGD(params[:1], lr=0.1, backend=backend), torch.optim.ASGD(params[1:], lr=0.1, foreach=True)
    for first in (math.inf, 1.0):
        for p, optimizer in zip(params, optimizers):
            p.grad = torch.tensor([first, -1.0, math.nan], device=device)
            optimizer.step()
        # Two steps' roundings.
        torch.testing.assert_close(*params, rtol=1e-6, atol=0, equal_nan=True)
    assert params[1][0].isnan()
