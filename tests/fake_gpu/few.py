"""A plugin of pytest: ``--few N`` takes N cases of every test."""

import collections
import random

import pytest


def pytest_addoption(parser):
    parser.addoption("--few", type=int, help="run as many cases of every test, chosen by chance")


@pytest.hookimpl(trylast=True)  # of those that -k leaves
def pytest_collection_modifyitems(config, items):
    few, chance = config.getoption("--few"), random.Random(0)
    if few is None:
        return
    cases = collections.defaultdict(list)
    for item in items:
        cases[item.path, getattr(item, "originalname", item.name)].append(item)
    chosen = {item for some in cases.values() for item in chance.sample(some, min(few, len(some)))}
    items[:] = [item for item in items if item in chosen]
