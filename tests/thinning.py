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


def every_pair_but(*alone):
    """The same, but of the parameters with these names every value, whatever stands beside it."""
    return pytest.mark.covers(2, *alone)


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
    for (_, _, _, *arguments), cases in tests.items():
        chosen = covering([combinations(item, *arguments) for item in cases])
        dropped |= {item for k, item in enumerate(cases) if k not in chosen}
    if dropped:
        config.hook.pytest_deselected(items=[item for item in items if item in dropped])
        items[:] = [item for item in items if item not in dropped]


def combinations(item, count, *alone):
    """All sets of so many of an item's parameters, with their values, and those that stand alone. Objects are values of
    their own."""
    simple = str, int, float, bool, type(None)
    params = sorted(item.callspec.params.items())
    values = [(name, value if isinstance(value, simple) else id(value)) for name, value in params]
    together = [value for value in values if value[0] not in alone]
    return {*itertools.combinations(together, min(count, len(together))), *((v,) for v in values if v[0] in alone)}


def covering(sets):
    """The indices of a few sets whose union is that of all: one by one the first that brings most."""
    left, chosen = set().union(*sets), set()
    while left:
        best = max(range(len(sets)), key=lambda k: len(sets[k] & left))
        chosen.add(best)
        left -= sets[best]
    return chosen
