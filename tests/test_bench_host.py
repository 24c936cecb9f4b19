"""bench/host.py: what it claims to measure is measured."""

import sys

import pytest
from programs import BENCH, program

from fusedopt import backends


@pytest.mark.skipif(backends.triton_problem() is not None, reason="measures the Triton backend")
def test_every_case_is_measured():
    options = ["--optimizers", "SGD", "--counts", "20", "40", "--rounds", "2"]
    done = program(sys.executable, BENCH / "host.py", *options)
    assert done.returncode == 0, done.stderr[-2000:]
    _, *rows = [line.split() for line in done.stdout.splitlines()]
    assert [row[:3] for row in rows] == [["SGD", count, clip] for count in ("20", "40") for clip in ("no", "yes")]
    # The median and the least of two of ours, and of torch's fused and foreach.
    assert all(len(row) == 3 + 8 for row in rows)
    assert all(10 < float(row[column]) < 100_000 for row in rows for column in (3, 5, 7, 9))


@pytest.mark.skipif(backends.triton_problem() is not None, reason="measures the Triton backend")
def test_plans_of_every_size_are_measured():
    done = program(sys.executable, BENCH / "scale.py", "--counts", "20", "40", "--repeats", "1")
    assert done.returncode == 0, done.stderr[-2000:]
    _, *rows = [line.split() for line in done.stdout.splitlines()]
    assert [row[:2] for row in rows] == [[b, count] for b in ("torch", "triton") for count in ("20", "40")]
    assert all(0 < float(row[column]) < 10_000 for row in rows for column in (2, 4, 6))
