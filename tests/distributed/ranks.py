"""Tests that run on several ranks: ``@pytest.mark.ranks(2)`` runs the test's function on each of two processes.

All selected tests of one folder and number of ranks share a process group. ``pytest -rP`` shows what they measured. The
hooks serve the folders whose ``conftest.py`` imports them.
"""

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
    world = ranks(pyfuncitem)
    if world is None:
        return None
    if not dist.is_gloo_available():
        pytest.skip("torch was built without gloo")
    outcomes = pyfuncitem.config.stash[UNRUN]
    if pyfuncitem.nodeid not in outcomes:
        beside = (item for item in pyfuncitem.session.items if item.path.parent == pyfuncitem.path.parent)
        items = [item for item in beside if ranks(item) == world]
        results = launch.run(world, [case(item) for item in items])
        outcomes.update((item.nodeid, result) for item, result in zip(items, results))
    report(pyfuncitem, outcomes[pyfuncitem.nodeid])
    return True


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
