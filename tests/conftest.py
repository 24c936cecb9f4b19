"""What all tests share: where they run, and memory that is NaN until somebody writes it.

With a GPU the kernels run on it; without one, on CPU tensors in Triton's interpreter.
"""

import gc
import os
from importlib.util import find_spec

import old_torch
import pytest
import thinning
import torch

from fusedopt import backends

old_torch.repair()

GPU = torch.cuda.is_available()
if not GPU:
    # Read when a function is decorated, so before anything imports Triton.
    os.environ["TRITON_INTERPRET"] = "1"

NEEDS_DEMO = "test_convergence.py", "test_demo*.py", "test_docs.py"
"""Files that train the demo's lessons."""
missing = [name for name in ("matplotlib", "PIL", "sklearn", "tqdm") if find_spec(name) is None]
collect_ignore_glob = list(NEEDS_DEMO) if missing else []

if backends.triton_problem() is not None:
    # They cannot even import the kernels.
    collect_ignore_glob += ["test_kernel*.py", "test_compile*.py"]
elif not GPU:
    from fusedopt import triton_norm

    # The interpreter runs one program after the other, at a millisecond each.
    triton_norm.SLOTS = 4


def pytest_configure(config):
    gc.disable()  # until all is collected, which makes objects by the million and garbage hardly
    config.addinivalue_line(
        "markers", "covers(n, *alone): run enough cases that every n values of parameters but these occur together"
    )


def pytest_report_header():
    return [f"not collected, for want of {', '.join(missing)}: {', '.join(NEEDS_DEMO)}"] if missing else []


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    if config.getvalue("dist") != "loadfile":
        return None
    from scheduling import Scheduling

    config.option.loadscopereorder = False  # the order of the tests is the right one
    return Scheduling(config, log)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    thinning.thin(config, items)
    if hasattr(config, "workerinput"):
        from scheduling import order

        order(items)


def pytest_collection_finish():
    """What the imports have left would otherwise be looked through at every collection of garbage: a seventh of the
    interpreter's time, which makes tensors by the million."""
    gc.collect()
    gc.freeze()
    gc.enable()


def pytest_sessionfinish():
    gc.unfreeze()  # or extension modules complain of what is left at the exit


@pytest.fixture
def device(request):
    """Where the tensors of a test live. The fallback's are on the CPU: a GPU without kernels is left to torch.optim."""
    params = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    return torch.device("cuda" if GPU and params.get("backend") != "torch" else "cpu")


@pytest.fixture(scope="session")
def needs_triton():
    """Skip a test where the kernels cannot run."""
    try:
        backends.backend("cuda" if GPU else "cpu", "triton")
    except RuntimeError as problem:
        pytest.skip(str(problem))


@pytest.fixture(params=["torch", "triton"])
def backend(request):
    """The ``backend`` argument of an optimizer: a test that asks for it runs with both."""
    if request.param == "triton":
        request.getfixturevalue("needs_triton")
    return request.param


@pytest.fixture(autouse=True)
def seeded():
    """Random numbers do not depend on which tests ran before in the same process."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def uninitialised_memory_is_nan():
    """``torch.empty`` and its like return NaN, or the largest number of an integer type."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("empty", "empty_like", "empty_strided"):
            patch.setattr(torch, name, poisoned(getattr(torch, name)))
        for name in ("new_empty", "new_empty_strided"):
            patch.setattr(torch.Tensor, name, poisoned(getattr(torch.Tensor, name)))
        yield


def poisoned(allocate):
    """``allocate``, then the worst value all over the new memory, gaps between elements included."""

    def wrapper(*args, **kwargs):
        tensor = allocate(*args, **kwargs)
        # torch's own switch for this (fill_uninitialized_memory) works in its deterministic mode only,
        # which forbids operations and changes others. Subclasses, meta tensors and traces have no memory.
        plain = type(tensor) is torch.Tensor and tensor.layout is torch.strided and not tensor.is_meta
        if plain and not torch.compiler.is_compiling():
            elements = tensor.untyped_storage().nbytes() // tensor.itemsize
            tensor.detach().as_strided((elements,), (1,), 0).fill_(worst(tensor.dtype))
        return tensor

    return wrapper


def worst(dtype):
    if dtype.is_floating_point or dtype.is_complex:
        return float("nan")
    return True if dtype is torch.bool else torch.iinfo(dtype).max
