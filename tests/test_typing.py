"""What type checkers and editors see: a typed package, the signature of each class, and settings as its attributes."""

import ast
import configparser
import inspect
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import stubs
from cases import every_optimizer
from options import IN_TORCH

import fusedopt

PACKAGE = Path(fusedopt.__file__).parent
ROOT = Path(__file__).parent.parent
STUB = ast.parse(stubs.STUB.read_text()).body


def test_the_package_is_typed():
    """Also where it is installed, into which only what setup.cfg lists is copied."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    listed = setup["options.package_data"]["fusedopt"].split(", ")
    assert listed == ["py.typed", stubs.STUB.name] and all((PACKAGE / name).exists() for name in listed)


@every_optimizer
def test_every_setting_is_annotated_as_its_field(name):
    cls = fusedopt.registry[name]
    annotated = {}
    for base in reversed(cls.__mro__):
        annotated |= inspect.get_annotations(base) if base.__module__.startswith("fusedopt.") else {}
    fields = cls.settings_class.fields()
    assert {name: field.type for name, field in fields.items()} == {name: annotated.get(name) for name in fields}


def described(function):
    """Each argument of a signature by name: whether it has no position, its annotation and its default."""
    of = function.args
    defaults = [None] * (len(of.args) - len(of.defaults)) + of.defaults
    listed = [(False, a, d) for a, d in zip(of.args, defaults)] + [
        (True, *a) for a in zip(of.kwonlyargs, of.kw_defaults)
    ]
    return {a.arg: (alone, a.annotation and ast.unparse(a.annotation), d and ast.unparse(d)) for alone, a, d in listed}


@every_optimizer
def test_the_stub_has_the_signature(name):
    """``python tests/stubs.py`` writes it. An older torch may lack some of torch's arguments, and annotate the others
    otherwise."""
    (stub,) = (described(node.body[0]) for node in STUB if isinstance(node, ast.ClassDef) and node.name == name)
    cls = fusedopt.registry[name]
    made = described(ast.parse(f"def __init__(self, {', '.join(stubs.signature(cls))}): ...").body[0])
    if name in IN_TORCH:
        settings = cls.settings_class.fields()
        stub = {key: stub[key] for key in stub if key in made}
        for key in made.keys() - settings:
            stub[key], made[key] = ((alone, default) for alone, _, default in (stub[key], made[key]))
    assert list(stub.items()) == list(made.items())


def test_the_stub_has_everything_else():
    made = ast.parse(stubs.text()).body
    (classes, there), (expected, here) = map(parted, (STUB, made))
    assert classes == expected == sorted(fusedopt.registry) and there == here
    names = {alias.asname for node in STUB if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert names | set(classes) >= set(fusedopt.__all__)


def parted(body):
    """The names of the classes, and all other lines."""
    classes = [node for node in body if isinstance(node, ast.ClassDef)]
    return [node.name for node in classes], [ast.unparse(node) for node in body if node not in classes]


REFUSED = """
import torch
import fusedopt

p = [torch.zeros(3)]
fusedopt.AdamW(p, max_grad_nrom=1.0)
fusedopt.AdamW(p, max_grad_norm="1")
fusedopt.Adam(p, 0.1, (0.9, 0.99), 1e-8, 0.0, False, True)
fusedopt.Lion(p, betas=0.9)
fusedopt.AdamW(p).clip_grad_norm_("1")
fusedopt.AdamV
"""

ACCEPTED = """
from typing import Any

import torch
import fusedopt
from fusedopt import AdamW, schedules, stopping


class Mine(fusedopt.AdamW):
    def __init__(self, params: list[torch.Tensor], lr: float = 1e-3) -> None:
        super().__init__(params, lr, max_grad_norm=1.0)


class WithScalars(fusedopt.FusedOptimizer):
    def rule(self, group: dict[str, Any]) -> fusedopt.Rule:
        return fusedopt.Lion([torch.zeros(3)]).rule(group)

    def hyper(self, group: dict[str, Any], t: int, eta: float) -> tuple[float, ...]:
        return (eta,)


optimizer = Mine([torch.zeros(3)])
optimizer.max_grad_norm = 2.0
base: torch.optim.AdamW = optimizer
ours: fusedopt.FusedOptimizer = fusedopt.SGD([torch.zeros(3)], lr=torch.tensor(0.1), nesterov=True, momentum=0.9)
schedule = schedules.CosineRestarts(optimizer, 10)
made: type[fusedopt.FusedOptimizer] = fusedopt.registry["Lion"]
norm: torch.Tensor = optimizer.grad_norm
print(fusedopt.__version__, fusedopt.backend().name, stopping.Iterations(3))
"""


@pytest.mark.skipif(find_spec("mypy") is None, reason="mypy is not installed")
def test_a_type_checker_sees_what_is_right_and_what_is_not(tmp_path):
    """The README's examples too: what is written there without types is checked as if it had some."""
    examples = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    files = {"refused": REFUSED, "accepted": ACCEPTED}
    files |= {f"readme{number}": text for number, text in enumerate(examples) if "import fusedopt" in text}
    for name, text in files.items():
        (tmp_path / f"{name}.py").write_text(text)
    # As where fusedopt is installed, its own lines are not checked.
    options = ["--check-untyped-defs", "--follow-imports=silent", "--no-error-summary"]
    command = [sys.executable, "-m", "mypy", *options, *(f"{name}.py" for name in files)]
    environment = os.environ | {"MYPYPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    wrong = [re.match(r"(\w+)\.py:(\d+): error", line) for line in done.stdout.splitlines()]
    lines = REFUSED.splitlines()
    expected = [("refused", k) for k, line in enumerate(lines, 1) if line.startswith("fusedopt.")]
    assert [(match[1], int(match[2])) for match in wrong if match] == expected, done.stdout + done.stderr
