"""Tests that run on several ranks: ``@pytest.mark.ranks(2)`` runs the test's function on each of two processes.

All selected tests of one folder and number of ranks share a process group, and whichever comes first runs all of the
folder. ``pytest -rP`` shows what they measured. The hooks serve the folders whose ``conftest.py`` imports them.
"""

import itertools

import launch
import pytest
import torch.distributed as dist

UNRUN = pytest.StashKey[dict]()


def pytest_configure(config):
    config.addinivalue_line("markers", "ranks(n): run this test's function on each of n processes")
    config.stash.setdefault(UNRUN, {})


@pytest.fixture
def folder():
    """A folder that all ranks of a test share; they are given its path."""


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem):
    if ranks(pyfuncitem) is None:
        return None
    if not dist.is_gloo_available():
        pytest.skip("torch was built without gloo")
    outcomes = pyfuncitem.config.stash[UNRUN]
    if pyfuncitem.nodeid not in outcomes:
        outcomes.update(run_all_beside(pyfuncitem))
    report(pyfuncitem, outcomes[pyfuncitem.nodeid])
    return True


def run_all_beside(item):
    """The outcomes of all selected tests of its folder that run on several ranks, by name."""
    beside = [other for other in item.session.items if other.path.parent == item.path.parent]
    groups = [
        [other for other in beside if ranks(other) == world] for world in sorted(set(map(ranks, beside)) - {None})
    ]
    outcomes = launch.run([launch.Job(ranks(group[0]), list(map(case, group))) for group in groups])
    names = (other.nodeid for group in groups for other in group)
    return zip(names, itertools.chain.from_iterable(outcomes))


def ranks(item):
    mark = item.get_closest_marker("ranks")
    return mark.args[0] if mark else None


def case(item):
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    fixtures = {name: None for name in item.fixturenames if name == "folder"}
    return launch.Case(item.module.__name__, item.originalname, {**parameters, **fixtures})


def report(item, outcomes):
    measured = {key: max(o.measured.get(key, 0.0) for o in outcomes) for o in outcomes for key in o.measured}
    lines = [f"{max(o.seconds for o in outcomes):.2f} s", *(f"{key}: {value:.3g}" for key, value in measured.items())]
    item.add_report_section("call", "measured", "\n".join(lines))
    errors = [f"rank {rank}:\n{o.error}" for rank, o in enumerate(outcomes) if o.error]
    if errors:
        pytest.fail("\n".join(errors), pytrace=False)
