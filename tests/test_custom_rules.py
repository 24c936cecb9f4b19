"""Rules that stand outside the package: the README's example."""

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
from compiling import TRITONS, environment_of
from pairs import assert_same, close, raised, snapshot

import fusedopt
from fusedopt.__main__ import main

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
        import torch, my_lion, without_dynamo
        without_dynamo.prepare()
        p = torch.nn.Parameter(torch.ones(3)); p.grad = torch.ones(3)
        my_lion.MyLion([p], lr=0.5).step()
        assert torch.equal(p.detach(), torch.full((3,), 0.5))
    """
    folder = Path(my_lion.__file__).parent
    environment = environment_of("installed", [str(Path(__file__).parent)])
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], cwd=folder, env=environment, check=True)


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["AdamW", "RMSprop", "SGD", "NAdam", "Lion", "Adan", "LAMB"])
def test_numbers_of_a_subclass_count(name, dtype, device):
    """Also where torch's fused kernel would take the step, which computes its numbers by itself."""
    cls = fusedopt.registry[name]

    class Slower(cls):
        def lr(self, group, t, *scalars):
            return super().lr(group, t, *scalars) / 4

    class SlowerStill(Slower):
        pass

    ends = []
    for made, lr in ((cls, 0.01), (Slower, 0.04), (SlowerStill, 0.04)):
        p = torch.nn.Parameter(torch.linspace(-1, 1, 40, device=device).to(dtype))
        optimizer = made([p], lr=lr, weight_decay=0.0)
        for step in range(3):
            p.grad = torch.sin(p.detach() * (step + 3))
            optimizer.step()
        ends.append(p.detach().float())
    tolerance = 1e-6 if dtype == torch.float32 else 2**-7  # another order of operations; a step of bfloat16 below 2
    torch.testing.assert_close(ends[1], ends[0], rtol=0, atol=tolerance)
    assert torch.equal(ends[1], ends[2])


def test_a_setting_that_the_rule_refuses_is_not_kept(my_lion):
    class Plain(my_lion.MyLion, register=False):
        def rule(self, group):
            if self.cautious:
                raise TypeError("never cautious")
            return super().rule(group)

    optimizer = Plain([torch.nn.Parameter(torch.ones(3))], lr=1e-3)
    with pytest.raises(TypeError, match="never cautious"):
        optimizer.cautious = True
    assert not optimizer.cautious


def test_registered_only_if_asked(my_lion):
    assert "MyLion" not in fusedopt.registry

    class Registered(my_lion.MyLion, register=True):
        pass

    assert fusedopt.registry.pop("Registered") is Registered


STEP = """
import torch
import without_dynamo
from absent_gpu import NoGPU
from triton.runtime import driver
from fusedopt import backends

without_dynamo.prepare()
driver.set_active(NoGPU("sm_90", "example"))
backends._device_problem = lambda device, requested: None
import my_lion

p = torch.nn.Parameter(torch.ones(300))
p.grad = torch.ones(300)
my_lion.MyLion([p], max_grad_norm=1.0).step()
print(*sorted(kernel.metadata.name for kernel in driver.active.compiled()))
"""


@pytest.mark.parametrize("which", TRITONS)
def test_example_is_compiled(which, my_lion, needs_triton):
    """By both Tritons: what the interpreter runs, the compiler need not know."""
    paths = [str(Path(my_lion.__file__).parent), str(Path(__file__).parent)]
    environment = environment_of(which, paths)
    done = subprocess.run([sys.executable, "-c", STEP], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["step_lion_kernel", "sum_of_squares"]


def test_command_line(my_lion, needs_triton, capsys):
    """A file of one right and one wrong class."""
    file = Path(my_lion.__file__).with_name("two.py")
    wrong = EXAMPLE[EXAMPLE.index("class") :].replace("MyLion", "Wrong").replace("twin=lion", "twin=lambda g, s, h: g")
    file.write_text(EXAMPLE + wrong)
    assert main(["check", str(file)]) == 1
    right, wrong = capsys.readouterr().out.splitlines()
    assert right == "MyLion: the Triton function and the torch twin agree"
    assert wrong.startswith("Wrong: 'my_lion', step 1, float64, ") and "by the Triton function" in wrong


def mean(g, state, h):
    return state[0].lerp_(g, h[0])


@pytest.mark.parametrize("function", [None, mean])
def test_no_triton_function(function, needs_triton, device):
    class Mean(fusedopt.FusedOptimizer):
        def rule(self, group):
            return fusedopt.Rule("mean", ("m",), mean, kernel=function)

    p = torch.nn.Parameter(torch.ones(3, device=device))
    p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match=r"'mean' has no Triton function: give Rule\(kernel=...\)"):
        Mean([p], {"lr": 0.1}, backend="triton").step()
    assert torch.equal(p.detach().cpu(), torch.ones(3))
