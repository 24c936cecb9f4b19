"""Whether networks train as well with parameters and states in fewer bits: bench/convergence.py in short, its rows."""

import collections
import pathlib

import convergence
import pytest
from thinning import ALL

from fusedopt import demo

ROOT = pathlib.Path(__file__).parent.parent
STEPS, SEEDS = 120, 3
RIGHT = ["stochastic", "kahan", "split8 + 8-bit states"]
if ALL:  # forms that store more bits than one of these
    RIGHT += ["split8", "split", "stochastic + bfloat16 states"]


@pytest.fixture(scope="module")
def runs():
    with demo.cpu_threads(1):
        return list(convergence.run(["digits"], ["float32", "nearest", *RIGHT], SEEDS, STEPS))


@pytest.mark.parametrize("form", RIGHT)
def test_forms_end_where_float32_does(form, runs):
    """Within the spread over its seeds."""
    assert convergence.compare(runs, "digits", form).within


def test_rounding_to_the_nearest_is_seen(runs):
    """The study can tell: of updates below half a step of the parameters, most are lost."""
    found = convergence.compare(runs, "digits", "nearest")
    spread = convergence.compare(runs, "digits", "float32")
    assert not found.within
    assert found.low > spread.high
    assert found.paired > 5 * found.error


def test_committed_rows():
    """Complete, and what the documentation shows of them."""
    runs = convergence.read()
    counts = collections.Counter((run.task, run.form) for run in runs)
    assert counts == {(task, form): convergence.SEEDS for task in convergence.TASKS for form in convergence.FORMS}
    for run in runs:
        assert run.steps == convergence.TASKS[run.task].steps
        assert len(run.curve.split()) == convergence.POINTS
    assert convergence.table(runs) in (ROOT / "docs" / "precision.md").read_text()
    for task in convergence.TASKS:
        for form in convergence.FORMS:
            assert convergence.compare(runs, task, form).within == (not form.startswith("nearest")), (task, form)
