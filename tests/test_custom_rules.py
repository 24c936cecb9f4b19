"""Rules that stand outside the package: the README's example, and what ``check_rule`` sees."""

import inspect
import math
import pickle
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from cases import model
from options import NAMES, STATEFUL
from pairs import assert_same, close, raised, snapshot

import fusedopt
from fusedopt.check import check_file
from fusedopt.custom import ema, jit, tl

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
(EXAMPLE,) = (block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "class MyLion" in block)


@pytest.fixture(scope="module")
def my_lion(tmp_path_factory):
    """The README's example as a module of its own."""
    folder = tmp_path_factory.mktemp("example")
    (folder / "my_lion.py").write_text(EXAMPLE)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        import my_lion

        yield my_lion


def lion_in_float64(params, grads, lr, betas, weight_decay):
    """Chen et al., arXiv 2302.06675, algorithm 2, after clipping."""
    states = [torch.zeros_like(p) for p in params]
    for step in grads:
        for p, m, g in zip(params, states, step):
            c = betas[0] * m + (1 - betas[0]) * g
            p -= lr * (torch.sign(c) + weight_decay * p)
            m.mul_(betas[1]).add_((1 - betas[1]) * g)
    return params


def gradients(params, steps):
    generator = torch.Generator().manual_seed(0)
    return [[torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in params] for _ in range(steps)]


def run(optimizer, params, grads):
    for step in grads:
        for p, g in zip(params, step):
            p.grad = g.to(p.device, p.dtype)
        optimizer.step()


def test_example_is_short():
    assert len([line for line in EXAMPLE.splitlines() if line.strip()]) <= 30


@pytest.mark.parametrize("lr", [-1, -0.5, math.nan, torch.tensor(-1.0)], ids=str)
def test_no_learning_rate(my_lion, lr):
    """Refused in torch's words, which its classes say in their __init__, and a class of one's own need not."""
    p, q = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    message = re.escape(str(raised(lambda: torch.optim.Adam([p], lr=lr))))
    with pytest.raises(ValueError, match=message):
        my_lion.MyLion([p], lr=lr)
    optimizer = my_lion.MyLion([p])
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [q], "lr": lr})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("flatten", [False, True])
def test_example_equals_the_formula(my_lion, backend, flatten, device):
    """Two groups, clipping, and a checkpoint in the middle."""
    params = model("tiny", device=device)
    betas, grads = (0.8, 0.95), gradients(params, 5)
    groups = [{"params": params[:2], "weight_decay": 0.1}, {"params": params[2:], "lr": 0.01}]
    made = my_lion.MyLion(groups, 0.02, betas, backend=backend, flatten=flatten, max_grad_norm=0.5)
    expected = [p.detach().clone() for p in params]
    run(made, params, grads[:2])
    resumed = my_lion.MyLion([{"params": params[:2]}, {"params": params[2:]}], backend=backend, max_grad_norm=0.5)
    resumed.load_state_dict(made.state_dict())
    run(resumed, params, grads[2:])
    clipped = []
    for step in grads:
        norm = torch.cat([g.flatten() for g in step]).norm()
        clipped.append([(g * (0.5 / (norm + 1e-6)).clamp(max=1)).to(device) for g in step])
    for part, lr, weight_decay in ((slice(0, 2), 0.02, 0.1), (slice(2, None), 0.01, 0.0)):
        lion_in_float64(expected[part], [step[part] for step in clipped], lr, betas, weight_decay)
    # A dozen roundings of 1.1e-16; another sign would show as 0.01.
    close(params, expected, 1e-13)
    assert "my_lion" in made.layout() and f"backend {backend}" in made.layout()


def test_example_keeps_the_protocol(my_lion, device):
    params = model("tiny", device=device)
    made = my_lion.MyLion(params, max_grad_value=0.5)
    run(made, params, gradients(params, 2))
    again = pickle.loads(pickle.dumps(made))
    assert_same(snapshot(made), snapshot(again))
    assert again.max_grad_value == 0.5
    assert list(inspect.signature(my_lion.MyLion).parameters)[:5] == [
        "params", "lr", "betas", "weight_decay", "max_grad_norm",
    ]  # fmt: skip
    with pytest.raises(TypeError, match="momentum"):
        my_lion.MyLion(params, momentum=0.9)


def test_what_only_torchs_own_step_could_do(my_lion):
    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3).to_sparse()
    with pytest.raises(RuntimeError, match="MyLion cannot be combined with a sparse gradient"):
        my_lion.MyLion([p]).step()
    assert torch.equal(p.detach(), torch.ones(3))


def test_example_without_triton(my_lion):
    program = """
        import sys; sys.modules["triton"] = None
        import torch, my_lion
        p = torch.nn.Parameter(torch.ones(3)); p.grad = torch.ones(3)
        my_lion.MyLion([p], lr=0.5).step()
        assert torch.equal(p.detach(), torch.full((3,), 0.5))
    """
    folder = Path(my_lion.__file__).parent
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], cwd=folder, check=True)


def test_what_a_class_forgot_is_named(my_lion):
    with pytest.raises(NotImplementedError, match=r"FusedOptimizer has no rule\(group\)"):
        fusedopt.FusedOptimizer([torch.zeros(3)], {"lr": 0.1})

    class Forgot(fusedopt.FusedOptimizer):
        def rule(self, group):
            return my_lion.MyLion.LION

    p = torch.nn.Parameter(torch.zeros(3))
    p.grad = torch.ones(3)
    with pytest.raises(NotImplementedError, match=r"Forgot has no hyper\(group, t\)"):
        Forgot([p], {"lr": 0.1}).step()


def test_registered_only_if_asked(my_lion):
    assert "MyLion" not in fusedopt.registry

    class Registered(my_lion.MyLion, register=True):
        pass

    assert fusedopt.registry.pop("Registered") is Registered


def test_command_line(my_lion, needs_triton):
    """A file of one right and one wrong class."""
    file = Path(my_lion.__file__).with_name("two.py")
    wrong = EXAMPLE[EXAMPLE.index("class") :].replace("MyLion", "Wrong").replace("twin=lion", "twin=lambda g, s, h: g")
    file.write_text(EXAMPLE + wrong)
    done = subprocess.run([sys.executable, "-m", "fusedopt", "check", file], capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    right, wrong = done.stdout.splitlines()
    assert right == "MyLion: the Triton function and the torch twin agree"
    assert wrong.startswith("Wrong: 'my_lion', step 1, float64, ") and "by the Triton function" in wrong


@pytest.mark.parametrize("name", NAMES)
def test_rules_of_the_package_pass(name, needs_triton):
    fusedopt.check_rule(fusedopt.registry[name], steps=2, sizes=(37,), **STATEFUL[name])


@jit
def kernel(g, state, h):
    m = ema(state[0], g, h[0])
    return m, (m,)


def twin(g, state, h):
    return state[0].lerp_(g, h[0])


@jit
def another_direction(g, state, h):
    m = ema(state[0], g, h[0])
    return m + tl.where(g == 0, 1.0, 0.0), (m,)


@jit
def another_state(g, state, h):
    m = ema(state[0], g, h[0])
    return m, (m * 1.001,)


@jit
def one_state_more(g, state, h):
    m = ema(state[0], g, h[0])
    return m, (m, m)


@jit
def one_number_more(g, state, h):
    m = ema(state[0], g, h[1])
    return m, (m,)


def writes_to_g(g, state, h):
    return g.mul_(h[0]).add_(state[0].lerp_(g, 0.5))


def leaves_states(g, state, h):
    state[0] = state[0].lerp(g, h[0])
    return state[0]


def changes_dtype(g, state, h):
    return state[0].lerp_(g, h[0]).half()


def mixes_elements(g, state, h):
    state[0].lerp_(g, h[0])
    return state[0] / state[0].norm()


@pytest.mark.parametrize(
    ("kernel", "twin", "message"),
    [
        (another_direction, twin, r"step 1, float64, .* magnitude 0: u\[0\] is 1.0 by .*Triton.*, 0.0 by .*twin"),
        (another_state, twin, r"the new state 'm'\[\d\] is "),
        (one_state_more, twin, "does not run: .*as many states"),
        (one_number_more, twin, "does not run: "),
        (kernel, writes_to_g, "leave g alone"),
        (kernel, leaves_states, "in place"),
        (kernel, changes_dtype, r"like g, and returns torch.float16"),
        (kernel, mixes_elements, "by the t"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_differences(kernel, twin, message, needs_triton):
    with pytest.raises(AssertionError, match=message):
        fusedopt.check_rule(fusedopt.Rule("mean", ("m",), twin, kernel=kernel), (0.1,), sizes=(5,))


BROKEN = """
import beside
import fusedopt


class OneNumber(fusedopt.FusedOptimizer):
    RULE = fusedopt.Rule("one", (), lambda g, state, h: g * h[0])

    def __init__(self, params, lr=0.1, **settings):
        super().__init__(params, {"lr": lr}, **settings)

    def rule(self, group):
        return self.RULE

    def hyper(self, group, t):
        return 0.1


class TwoNumbers(OneNumber):
    def hyper(self, group, t):
        return ()
"""


def test_a_file_of_broken_classes(needs_triton, tmp_path, monkeypatch):
    """Each is reported, whatever it raises; the file may import what stands beside it."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "beside.py").write_text("")
    (tmp_path / "broken_rules.py").write_text(BROKEN)
    report = check_file(tmp_path / "broken_rules.py")
    assert report["OneNumber"] == "TypeError: hyper() of OneNumber must return a tuple of numbers, got 0.1"
    assert "the torch twin of 'one' does not run with h=(): IndexError" in report["TwoNumbers"]


def test_numbers_that_float32_cannot_hold(needs_triton):
    """Overflow on both sides alike, and NaN, are no difference."""
    rule = fusedopt.Rule("mean", ("m",), twin, kernel=kernel)
    fusedopt.check_rule(rule, (0.1,), magnitudes=(1e38, math.nan), sizes=(5,))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((fusedopt.Adam, (0.1,)), "leave h out"),
        ((fusedopt.Rule("mean", ("m",), twin, kernel=kernel),), "checked with its numbers"),
        (("adam",), "got 'adam'"),
    ],
)
def test_wrong_subjects(arguments, message):
    with pytest.raises(TypeError, match=message):
        fusedopt.check_rule(*arguments)


@pytest.mark.parametrize("function", [None, twin])
def test_no_triton_function(function, needs_triton, device):
    class Mean(fusedopt.FusedOptimizer):
        def rule(self, group):
            return fusedopt.Rule("mean", ("m",), twin, kernel=function)

    p = torch.nn.Parameter(torch.ones(3, device=device))
    p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match=r"'mean' has no Triton function: give Rule\(kernel=...\)"):
        Mean([p], {"lr": 0.1}, backend="triton").step()
    assert torch.equal(p.detach().cpu(), torch.ones(3))
