"""The kernel that makes the numbers of a step from formulas that were recorded (``capturable=True``)."""

import gc
import math
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import give_gradients, interpreter_noise, model
from compiling import TARGETS, TRITONS, environment_of
from graphs import Waits, capture
from options import NAMES
from test_capturable import no_launches, optimizer, rows_by_parameter  # noqa: F401

import fusedopt
from fusedopt.columns import maximum, minimum, number, product, scalar, where
from fusedopt.recorded import Recorded, program

FORMULAS = {
    "arithmetic": lambda t, x: (t + 2) * x - 3 / t + (1 - x) / 7 - (-t),
    "corrections": lambda t, x: (1 / (1 - 0.9**t), (1 - 0.999**t) ** -0.5, x**0.25, 2.0**x),
    "whole powers": lambda t, x: ((x - 3) ** 2, (x - 3) ** 3, (-x) ** -1, (x - x) ** 0, (x - x) ** 2, 0.0**t),
    "where": lambda t, x: (where(t == 1, x, 5.0), where(t > 2, 1.0, t), where(t <= x, t, x), where(t != 1, 0.5, x)),
    "order": lambda t, x: (where(t < x, 1.0, 0.0), where(x >= t, 1.0, 0.0), maximum(t, 2), minimum(x, 1.5)),
    "used twice": lambda t, x: ((t * x) * (t * x), t * x),
    "a number": lambda t, x: (0.5, number(t)),
}
STATES = [1.0, 2.0, 3.0], [0.5, 2.0, 4.0]


def as_tuple(found):
    return found if isinstance(found, tuple) else (found,)


def run(states, outputs, device):
    """What the kernel makes of outputs that were recorded: [rows, outputs]."""
    import triton.language as tl
    from fusedopt.kernels import numbers

    made = program([x for x, _ in states], outputs)
    memory = [torch.tensor(values, dtype=x.dtype, device=device) for x, values in states]
    count = len(memory[0])
    addresses = [[x.data_ptr() + k * x.itemsize for x in memory] for k in range(count)]
    table = torch.zeros(count, len(outputs), dtype=torch.float64, device=device)
    numbers.write_rows[(1,)](
        table, torch.arange(2 * count, device=device).view(-1, 2) // 2, torch.tensor(addresses, device=device), None,
        torch.tensor([made.constants], dtype=torch.float64, device=device), count,
        STATES=tuple({torch.float32: tl.float32, torch.float64: tl.float64}[x.dtype] for x in memory), TENSORS=(),
        CONSTANTS=len(made.constants), OUTPUTS=made.outputs, BLOCK=16, enable_fp_fusion=False,
        PROGRAM=tuple(getattr(numbers, x.upper()).value if isinstance(x, str) else x for x in made.operations),
    )  # fmt: skip
    return table.cpu()


@interpreter_noise
@pytest.mark.parametrize("formula", FORMULAS)
def test_formulas(formula, device, needs_triton):
    """Tolerance: powers by logarithms in float64."""
    states = [(Recorded("state"), values) for values in STATES]
    made = run(states, as_tuple(FORMULAS[formula](*(x for x, _ in states))), device)
    expected = [as_tuple(FORMULAS[formula](*row)) for row in zip(*STATES)]
    torch.testing.assert_close(made, torch.tensor(expected, dtype=torch.float64), rtol=4e-15, atol=0)


@interpreter_noise
def test_no_root_of_a_negative_number(device, needs_triton):
    x = Recorded("state")
    made = run([(x, [-1.0, 0.0, math.nan])], (x**0.5, x**-1.0, x**2), device)
    expected = torch.tensor([[math.nan, -1, 1], [0, math.inf, 0], [math.nan] * 3], dtype=torch.float64)
    assert torch.equal(made.nan_to_num(nan=-7), expected.nan_to_num(nan=-7))


def test_float32_rounds_as_numpy_does(device, needs_triton):
    """To the last bit."""
    values = np.float32([0.1, 0.7, 1.3])
    x, t = Recorded("state", (), torch.float32), Recorded("state")
    formulas = (
        lambda x, t: product(x, 0.9), lambda x, t: product(x, 1 / t), lambda x, t: x * x + 0.1,
        lambda x, t: scalar(number(x) / 3, torch.float32), lambda x, t: number(x) / 3,
    )  # fmt: skip
    made = run([(x, values), (t, [3.0, 7.0, 9.0])], [f(x, t) for f in formulas], device)
    for row, a, b in zip(made, values, (3.0, 7.0, 9.0)):
        assert row.tolist() == [float(f(a, b)) for f in formulas]


@pytest.mark.parametrize(
    "formula",
    [bool, float, int, math.sqrt, torch.sqrt, lambda x: x + torch.ones(()), lambda x: 1 if x > 2 else 3,
     lambda x: x.to(torch.bfloat16), lambda x: maximum(x, "much")],
)  # fmt: skip
def test_what_cannot_be_recorded(formula):
    with pytest.raises(TypeError):
        formula(Recorded("state"))


def test_constants_are_not_part_of_the_program():
    """So that nothing is compiled when they change, be it to numbers that occur twice."""
    t = Recorded("state")
    found = [program([t], (lr, a / (1 - b**t), 0.0)) for lr, a, b in ((0.1, 1, 0.9), (0.9, 0.9, 0.9), (0.0, 0.0, 0.0))]
    assert len({(x.operations, x.outputs) for x in found}) == 1
    assert [x.constants[:3] for x in found] == [[0.1, 0.0, 0.0], [0.9, 0.0, 0.0], [0.0, 0.0, 0.0]]


def test_what_is_used_twice_is_computed_once():
    t = Recorded("state")
    power = 0.9**t
    assert program([t], [power * power, 1 - power]).operations[::4] == ("pow", "mul", "sub")


@pytest.mark.parametrize("name", NAMES)
def test_operations_of_torch_make_the_same_rows(name, device, monkeypatch, no_launches):  # noqa: F811
    """Which take the kernel's place where a formula cannot be recorded. Tolerance: as in test_capturable.py."""
    from fusedopt import triton_columns

    found = []
    for records in (True, False):
        monkeypatch.setattr(triton_columns, "can_record", lambda bucket, records=records: records)
        params = model("tiny", device=device)
        rates = [torch.tensor(lr, device=device) for lr in (0.1, 0.2)]
        opt = optimizer(name, params, max_grad_norm=1.0)
        for group, rate in zip(opt.param_groups, rates):
            group["lr"] = rate
        for step in range(8):
            give_gradients(params, step)
            opt.step()
        (executor,) = opt._engine.executors
        assert isinstance(executor.rows.way, triton_columns.Programs) == records
        found.append((rows_by_parameter(opt), opt.state_dict()["state"]))
    (rows, states), (other_rows, other_states) = found
    for position, row in rows.items():
        torch.testing.assert_close(other_rows[position], row, rtol=1e-11 if name == "RAdam" else 1e-13, atol=1e-300)
    for k, state in states.items():
        for key in {"step", "mu_product", "eta", "mu"} & state.keys():
            torch.testing.assert_close(other_states[k][key], state[key], rtol=2e-7, atol=0)


class Waves(fusedopt.AdamW):
    """Asks for more than the kernel can do."""

    def lr(self, group, t):
        return number(group["lr"]) * (1 + (torch.cos(t) if isinstance(t, torch.Tensor) else math.cos(t)))


def test_a_formula_that_cannot_be_recorded(device, no_launches):  # noqa: F811
    from fusedopt.triton_columns import Operations

    found = []
    for capturable in (False, True):
        params = model("tiny", device=device)
        opt = Waves(params, lr=0.1, capturable=capturable, backend="triton")
        for step in range(3):
            give_gradients(params, step)
            opt.step()
        found.append(rows_by_parameter(opt))
    assert isinstance(opt._engine.executors[0].rows.way, Operations)
    for position, row in found[0].items():
        torch.testing.assert_close(found[1][position], row, rtol=1e-13, atol=0)


@pytest.mark.parametrize(
    "dtypes", [(torch.bfloat16, torch.bfloat16), (torch.float32, torch.float64)], ids=["16 bits", "of two dtypes"]
)
def test_rates_that_the_kernel_does_not_read(dtypes, device, no_launches):  # noqa: F811
    params = [torch.nn.Parameter(torch.ones(3, device=device)) for _ in dtypes]
    rates = [torch.tensor(0.5, dtype=dtype, device=device) for dtype in dtypes]
    opt = fusedopt.AdamW([{"params": [p], "lr": lr} for p, lr in zip(params, rates)], capturable=True, backend="triton")
    for step in range(2):
        give_gradients(params, step)
        opt.step()
    assert [row[0].item() for row in rows_by_parameter(opt).values()] == [0.5, 0.5]


def test_graphs_keep_what_they_read(device, monkeypatch, needs_triton):
    """Also when eager steps have come to other families."""
    params = [torch.nn.Parameter(torch.ones(3, device=device)) for _ in range(2)]
    opt = fusedopt.AdamW([{"params": [p]} for p in params], capturable=True, backend="triton")
    for p in params:
        p.grad = torch.ones_like(p)
    opt.step()
    with capture(monkeypatch, opt._engine.executors) as graph:
        opt.step()
    (one,) = opt._engine.executors[0].rows.families
    read = [weakref.ref(x) for x in (one.members, *(pair[1] for pair in (one.later.frozen + one.options.frozen)))]
    if hasattr(graph, "calls"):
        graph.calls.clear()  # a true graph keeps nothing alive
    del one
    opt.param_groups[0]["eps"] = 0.1
    opt.step()
    gc.collect()
    assert len(read) == 3 and all(x() is not None for x in read)


@pytest.mark.parametrize("name", NAMES)
def test_two_launches_and_no_operation(name, device, monkeypatch, needs_triton):
    """However many groups there are: their rates are tensors, and one of them decays."""
    from fusedopt.launch import Launches

    launched = []
    monkeypatch.setattr(Launches, "__call__", lambda self, kernel, *args, **constants: launched.append(kernel.__name__))
    params = [torch.nn.Parameter(torch.ones(3, device=device)) for _ in range(5)]
    groups = [{"params": [p], "lr": torch.tensor(0.1 + k, device=device)} for k, p in enumerate(params)]
    opt = fusedopt.registry[name](groups, capturable=True, max_grad_norm=1.0, backend="triton")
    for p in params:
        p.grad = torch.ones_like(p)
    for _ in range(3):
        opt.step()
    launched.clear()
    with Waits() as counted:
        opt.step()
    assert [kernel for kernel in launched if kernel in ("write_rows", "advance")] == ["write_rows", "advance"]
    with Waits() as of_memory:  # which the tests fill
        torch.empty(5, 3, device=device)
    assert counted.count == of_memory.count


STEP = """
import torch
import without_dynamo
from absent_gpu import NoGPU
from triton.runtime import driver
import fusedopt
from fusedopt import backends
from fusedopt.kernels import numbers
from fusedopt.launch import Launches

without_dynamo.prepare()
backends._device_problem = lambda device, requested: None
launch = Launches.__call__


def launch_numbers(self, kernel, *args, **constants):
    if kernel in (numbers.write_rows, numbers.advance):
        launch(self, kernel, *args, **constants)


Launches.__call__ = launch_numbers
for target in TARGETS:
    driver.set_active(NoGPU(target, "numbers"))
    for name in ("RAdam", "ASGD"):
        p = torch.nn.Parameter(torch.ones(300))
        p.grad = torch.ones(300)
        fusedopt.registry[name]([p], lr=torch.tensor(0.1), capturable=True, skip_nonfinite=True).step()
    made = driver.active.compiled()
    calls = ["call" in kernel.asm.get("ptx", "").split() for kernel in made]
    print(target, *(kernel.n_spills for kernel in made), *calls)
"""


@pytest.mark.parametrize("which", TRITONS)
def test_compiled_for_every_gpu(which, needs_triton):
    """Powers in float64 are the compiler's own, and nothing is spilled."""
    environment = environment_of(which, [str(Path(__file__).parent)])
    targets = TARGETS if which == "installed" else ["sm_90", "gfx942"]
    text = STEP.replace("TARGETS", repr(targets))
    done = subprocess.run([sys.executable, "-c", text], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines() == [f"{target} 0 0 0 0 False False False False" for target in targets]
