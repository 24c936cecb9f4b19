"""Options of ``pytest bench/``, and the table that it ends with."""

import pytest
import torch
from cpu import MAIN
from device import device
from problem import Case
from rivals import IMPLEMENTATIONS
from shapes import GPU_ONLY, MODELS
from step import HEADER, USUAL, line
from variants import VARIANTS

pytest.importorskip("pytest_benchmark", reason="pytest bench/ needs pytest-benchmark: pip install 'fusedopt[bench]'")

ROWS = pytest.StashKey[list]()


def pytest_addoption(parser):
    group = parser.getgroup("fusedopt")
    group.addoption("--models", nargs="+", choices=MODELS, help="default: the ones that are quick on this machine")
    group.addoption("--optimizers", nargs="+", choices=VARIANTS, help="default: all, fewer on a CPU's larger models")
    group.addoption("--implementations", nargs="+", choices=IMPLEMENTATIONS, help="default: all but compiled")
    group.addoption("--with", dest="more", nargs="+", choices=("amp", "bfloat16"), default=(), help="also these cases")
    group.addoption("--everything", action="store_true", help="every model, optimizer and implementation: an hour")
    group.addoption("--seconds", type=float, default=0.2, help="per case, at least five rounds (default: %(default)s)")
    group.addoption("--threads", type=int, default=1, help="of the CPU (default: %(default)s)")


def pytest_configure(config):
    config.stash[ROWS] = []


@pytest.fixture(scope="session")
def on(pytestconfig):
    """The device that measures."""
    torch.set_num_threads(pytestconfig.option.threads)
    return device()


def pytest_terminal_summary(terminalreporter, config):
    if config.stash[ROWS]:
        terminalreporter.section("fusedopt")
        terminalreporter.write_line(HEADER)
        for row in config.stash[ROWS]:
            terminalreporter.write_line(line(row))


QUICK = {"mlp": list(VARIANTS), "small1000": list(VARIANTS), "groups465": MAIN, "resnet50": MAIN}
"""What a CPU measures unless asked for more: minutes instead of an hour."""


def chosen_cases(options):
    """Every case that the command line selects."""
    everything = options.everything or torch.cuda.is_available()
    models = [m for m in MODELS if torch.cuda.is_available() or m not in GPU_ONLY] if everything else QUICK
    kinds = [(False, "float32"), *((name == "amp", "float32" if name == "amp" else name) for name in options.more)]
    for model in options.models or models:
        for label in options.optimizers or (VARIANTS if everything else QUICK.get(model, MAIN)):
            for clip in (False, True):
                for amp, dtype in kinds:
                    yield Case(model, label, clip, amp, dtype)


def chosen_implementations(options):
    if options.implementations:
        return options.implementations
    if options.everything:
        return list(IMPLEMENTATIONS)
    return list(USUAL) if not torch.cuda.is_available() else [name for name in IMPLEMENTATIONS if name != "compiled"]


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames:
        cases = list(chosen_cases(metafunc.config.option))
        metafunc.parametrize("case", cases, ids=str, scope="module")
        metafunc.parametrize("implementation", chosen_implementations(metafunc.config.option))
