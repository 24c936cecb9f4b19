"""What a rule of one's own is written with, in a file that machines without Triton can import too::

    from fusedopt.custom import jit, tl

``jit`` is ``triton.jit``, ``tl`` is ``triton.language``, and ``divide``, ``sqrt``, ``sign``, ``ema``,
``ema_of_squares`` are the functions of ``kernels/arithmetic.py``, of which the package's rules are made. Without Triton
``jit`` returns the function as it is, and the others are None: nothing will call them there. Triton 3.6 knows no tuples
inside of tuples on the left of an assignment: its error is "unhashable type: 'list'".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .backends import triton_problem

LANGUAGE = ("tl", "divide", "sqrt", "sign", "ema", "ema_of_squares")


def jit(function: Callable) -> Callable:
    """Make a Triton function of ``function(g, state, h) -> (u, new_state)``, or of one that such a function calls."""
    if triton_problem() is not None:
        return function
    import triton

    return triton.jit(function)


def __getattr__(name: str) -> Any:
    # Not at import: TRITON_INTERPRET is read when Triton functions are defined.
    if name not in LANGUAGE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if triton_problem() is not None:
        return None
    from . import triton_backend

    return getattr(triton_backend.rules, name)
