"""Whether lists hold the very objects that they held before, asked at every step."""

from __future__ import annotations

from collections.abc import Collection
from operator import is_
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


def same(a: Collection[Any], b: Collection[Any]) -> bool:
    return len(a) == len(b) and all(map(is_, a, b))


class _Unequal(TorchFunctionMode):
    """Within it two tensors are never equal, and nothing is computed to find out."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> bool:
        return False


_UNEQUAL = _Unequal()


def same_tensors(a: Any, b: Any) -> bool:
    """``same`` for lists of tensors, of dicts that hold the same tensors under the same keys, and so on, much faster:
    Python's == of lists and dicts asks objects only where they are not identical."""
    try:
        torch._C._push_on_torch_function_stack(_UNEQUAL)  # as ``with`` does, in a tenth of the time
        return a == b
    except ValueError:  # an array of NumPy's compares element by element
        return False
    finally:
        torch._C._pop_torch_function_stack()
