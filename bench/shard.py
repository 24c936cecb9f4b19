"""A plugin of pytest for machines without xdist: ``-p shard --shard=K/N`` runs every N-th test, from the K-th."""

from __future__ import annotations


def pytest_addoption(parser):
    parser.addoption("--shard", required=True, help="K/N, with K from 0 to N - 1")


def pytest_collection_modifyitems(config, items):
    part, count = map(int, config.getoption("shard").split("/"))
    # Neighbours take about the same time, so every shard gets its share of them.
    items[:] = items[part::count]
