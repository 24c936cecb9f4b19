"""Of a product of parameters a few cases are left, and none of what shall occur together is lost."""

import itertools

import pytest
from thinning import covering

PRODUCT = list(itertools.product(range(9), "abcde", (None, True, 2.5), (0, 1)))


@pytest.mark.parametrize(("count", "most"), [(1, 9), (2, 54)])
def test_what_occurs_together_still_does(count, most):
    sets = [set(itertools.combinations(enumerate(case), count)) for case in PRODUCT]
    chosen = covering(sets)
    assert set().union(*(sets[k] for k in chosen)) == set().union(*sets)
    assert len(chosen) <= most


def test_nothing_is_chosen_twice_or_of_nothing():
    assert covering([{1, 2}, {1}, {2}]) == {0}
    assert covering([set()]) == set()
    assert covering([{k} for k in range(7)]) == set(range(7))
