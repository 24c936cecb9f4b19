"""A plugin of pytest, for machines without xdist: ``-p shard --shard=K/N`` runs every N-th test, from the K-th; what a
GPU is needed for comes first. What fails is printed at once, since a run may be cut off before its end."""

from __future__ import annotations

import pytest

FIRST = (
    "test_kernels.py", "test_kernel_norm.py", "test_kernel_skips.py", "test_kernel_memory.py", "test_numbers.py",
    "test_graphs.py", "test_capturable.py", "test_refresh.py", "test_optimizers.py",
)  # fmt: skip
LAST = (
    "test_bench_host.py", "test_bench_report.py", "test_convergence.py", "test_demo_input.py", "test_docs.py",
    "test_emulated.py", "test_ptx.py", "test_typing.py", "test_compile.py", "test_compile_forms.py", "test_demo.py",
)  # fmt: skip
"""The same on every machine."""
RANKS = {**{name: number - len(FIRST) for number, name in enumerate(FIRST)}, **dict.fromkeys(LAST, 1)}

LOST = 77
"""The exit code of a process whose GPU takes no more work, after an illegal access, say: all later tests would fail."""


def pytest_addoption(parser):
    parser.addoption("--shard", required=True, help="K/N, with K from 0 to N - 1")
    parser.addoption("--behind", type=int, default=0, help="leave out so many tests of the shard")


def pytest_configure(config):
    config.pluginmanager.register(Failures(config), "failures at once")


def pytest_collection_modifyitems(config, items):
    part, count = map(int, config.getoption("shard").split("/"))
    items.sort(key=lambda item: RANKS.get(item.path.name, 0))
    # Neighbours take about the same time, so every shard gets its share of them.
    items[:] = items[part::count][config.getoption("behind") :]


class Failures:
    def __init__(self, config):
        self.config = config
        self.begun = config.getoption("behind")

    def pytest_runtest_logstart(self):
        self.begun += 1

    @pytest.hookimpl(trylast=True)  # behind the line that names the test
    def pytest_runtest_logreport(self, report):
        if not report.failed:
            return
        self.config.get_terminal_writer().write(f"\n{report.longreprtext}\n", flush=True)
        if not gpu_works():
            pytest.exit(f"the GPU was lost in this process behind {self.begun} tests", returncode=LOST)


def gpu_works() -> bool:
    import torch

    try:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True
