"""Tests of this folder may run on several ranks."""

from ranks import folder, pytest_configure, pytest_pyfunc_call

__all__ = ["folder", "pytest_configure", "pytest_pyfunc_call"]
