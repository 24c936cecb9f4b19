"""Tests of this folder may run on several ranks, as those in tests/distributed."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "distributed"))

from ranks import folder, pytest_configure, pytest_pyfunc_call

__all__ = ["folder", "pytest_configure", "pytest_pyfunc_call"]
