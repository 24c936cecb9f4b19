"""Fewer cases of tests that are products of many parameters; with FUSEDOPT_CASES=all whole products run.

Where a fault would show in one value, or in two values together, whatever the others are, a few cases find it too.
"""

import itertools
import os

import pytest

ALL = os.environ.get("FUSEDOPT_CASES") == "all"

every_value = pytest.mark.covers(1)
"""Enough cases that every value of every parameter occurs in one."""

every_pair = pytest.mark.covers(2)
"""Enough cases that every two values that occur together in the whole product do so in one of them."""


def thin(config, items):
    """Leave enough of each marked test, as pytest deselects; in place."""
    if ALL:
        return
    tests = {}
    for item in items:
        mark = item.get_closest_marker("covers")
        if mark is not None:
            tests.setdefault((item.path, item.cls, item.originalname, *mark.args), []).append(item)
    dropped = set()
    for (*_, count), cases in tests.items():
        chosen = covering([combinations(item, count) for item in cases])
        dropped |= {item for k, item in enumerate(cases) if k not in chosen}
    if dropped:
        config.hook.pytest_deselected(items=[item for item in items if item in dropped])
        items[:] = [item for item in items if item not in dropped]


def combinations(item, count):
    """All sets of so many of an item's parameters, with their values. Objects are values of their own."""
    simple = str, int, float, bool, type(None)
    params = sorted(item.callspec.params.items())
    values = [(name, value if isinstance(value, simple) else id(value)) for name, value in params]
    return set(itertools.combinations(values, min(count, len(values))))


def covering(sets):
    """The indices of a few sets whose union is that of all: one by one the first that brings most."""
    left, chosen = set().union(*sets), set()
    while left:
        best = max(range(len(sets)), key=lambda k: len(sets[k] & left))
        chosen.add(best)
        left -= sets[best]
    return chosen
