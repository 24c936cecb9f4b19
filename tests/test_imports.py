"""Imports run one way: kernels -> triton; fusedopt.<optimizer> -> optimizer -> engine -> what it is made of. And every
module is where a reader of CONTRIBUTING looks for it."""

import ast
import graphlib
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from rule_cases import shipped_optimizers

ROOT = Path(__file__).parent.parent
KERNELS = sorted((ROOT / "kernels").glob("*.py"))
PACKAGE = sorted((ROOT / "fusedopt").glob("*.py"))
OPTIMIZERS = {cls.__module__.removeprefix("fusedopt.") for cls in shipped_optimizers()}
PROGRAM = {"__main__", "demo", "demo_distributed", "demo_options", "lessons", "paths", "plots"}
"""What uses the package as anybody might."""
TRITON = {path.stem for path in PACKAGE if path.stem.startswith("triton_")} | {"launch"}
"""What a machine without Triton cannot import."""


def imports(path: Path, package: str) -> list[tuple[str, bool]]:
    """Every module that a file imports, by its full name, and whether it does so when it is imported itself.
    ``from package import name`` counts as ``package.name``, which may be a module or not."""
    tree = ast.parse(path.read_text())
    inner = {node for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for node in ast.walk(f)}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, node not in inner) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level < 2, f"{path}: nothing lies above"
            base = ".".join(filter(None, [package if node.level else "", node.module]))
            found += [(f"{base}.{alias.name}", node not in inner) for alias in node.names]
    return found


def graph() -> dict[str, set[str]]:
    """For each module of fusedopt, those that it imports when it is imported."""
    names = {path.stem for path in PACKAGE}
    edges = {}
    for path in PACKAGE:
        targets = [name for name, at_once in imports(path, "fusedopt") if at_once]
        edges[path.stem] = {name for name in names if any(f"{t}.".startswith(f"fusedopt.{name}.") for t in targets)}
    return edges


def reachable(start: str, edges: dict[str, set[str]]) -> set[str]:
    seen, todo = set(), [start]
    while todo:
        new = edges[todo.pop()] - seen
        seen |= new
        todo += new
    return seen


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.name)
def test_kernels_import_triton_and_nothing_else(path):
    for name, _ in imports(path, "fusedopt.kernels"):
        top = name.split(".")[0]
        assert top == "triton" or top in sys.stdlib_module_names or name.startswith("fusedopt.kernels.")


def test_only_the_triton_backend_knows_the_kernels():
    users = {path.stem for path in PACKAGE for name, _ in imports(path, "fusedopt") if "kernels" in name.split(".")}
    assert users <= TRITON


def test_triton_is_imported_only_where_it_is_needed():
    """A machine without Triton must be able to import the package."""
    at_once = {path.stem: [name for name, now in imports(path, "fusedopt") if now] for path in PACKAGE}
    outside = {name for names in at_once.values() for name in names if name.split(".")[0] == "triton"}
    assert outside
    assert {m for m, names in at_once.items() if outside.intersection(names)} <= TRITON
    assert {module for module, targets in graph().items() if TRITON & targets} <= TRITON


def test_imports_run_one_way():
    edges = graph()
    graphlib.TopologicalSorter(edges).prepare()  # raises CycleError, which names the cycle
    assert all("optimizer" in edges[module] for module in OPTIMIZERS)
    assert "engine" in edges["optimizer"]
    below = {module: reachable(module, edges) for module in edges}
    assert not below["optimizer"] & (OPTIMIZERS | PROGRAM)
    for module in below["engine"] | {"triton_backend"} | below["triton_backend"]:
        assert not below[module] & {"optimizer", "engine"}, module
    assert not below["__init__"] & PROGRAM


def test_imports_inside_functions_have_a_reason():
    """Triton and what needs it, which not every machine can import; whatever else is late hides a cycle."""
    late = {
        (path.stem, name)
        for path in PACKAGE
        if path.stem not in PROGRAM
        for name, at_once in imports(path, "fusedopt")
        if not at_once
    }
    assert {name for _, name in late} <= {"triton", "fusedopt.triton_backend", "fusedopt.triton_probe"}


@pytest.mark.parametrize("path", [*KERNELS, *PACKAGE], ids=lambda path: f"{path.parent.name}/{path.name}")
def test_nothing_imports_tests_or_benchmarks(path):
    files = (file.stem for folder in ("tests", "bench") for file in (ROOT / folder).glob("*.py"))
    outside = {"tests", "bench", "pytest", *files}
    assert not [name for name, _ in imports(path, "fusedopt") if name.split(".")[0] in outside]


@pytest.mark.parametrize("folder", ["fusedopt", "kernels", "bench"])
def test_every_module_is_on_the_map(folder):
    """Of CONTRIBUTING, once; and nothing else is."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    (table,) = re.findall(rf"^\| in `{folder}/` .*\n\|---\|---\|\n((?:\|.*\n)+)", text, re.MULTILINE)
    listed = [name for row in table.splitlines() for name in re.findall(r"`(\w+)`", row.split("|")[1])]
    assert sorted(listed) == sorted(path.stem for path in ROOT.glob(f"{folder}/*.py") if path.stem != "__init__")


def test_a_checkout_that_is_not_installed(tmp_path):
    """It is found whole, also where another one is installed."""
    for folder in ("fusedopt", "kernels"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    code = "import fusedopt.kernels; print(fusedopt.__file__, fusedopt.kernels.__file__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(tmp_path / folder / "__init__.py") for folder in ("fusedopt", "kernels")]
