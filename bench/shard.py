"""A plugin of pytest, for machines without xdist: ``-p shard --shard=K/N`` runs every N-th test, from the K-th; what a
GPU is needed for comes first."""

from __future__ import annotations

FIRST = "test_kernels.py", "test_kernel_norm.py", "test_kernel_skips.py", "test_kernel_memory.py", "test_optimizers.py"
LAST = "test_compile.py", "test_compile_forms.py", "test_demo.py"
"""The same on every machine."""
RANKS = {**{name: number - len(FIRST) for number, name in enumerate(FIRST)}, **dict.fromkeys(LAST, 1)}


def pytest_addoption(parser):
    parser.addoption("--shard", required=True, help="K/N, with K from 0 to N - 1")


def pytest_collection_modifyitems(config, items):
    part, count = map(int, config.getoption("shard").split("/"))
    items.sort(key=lambda item: RANKS.get(item.path.name, 0))
    # Neighbours take about the same time, so every shard gets its share of them.
    items[:] = items[part::count]
