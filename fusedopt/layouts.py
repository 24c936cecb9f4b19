"""Whether tensors are laid out as others were, asked at every step."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch._C._dynamo.guards import TensorGuards


class Layouts:
    """The dtypes, devices, shapes and strides of some tensors. torch.compile's guards compare them in one pass,
    which makes no object per tensor."""

    def __init__(self, tensors: Sequence[Tensor]):
        self.guards = TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None)

    def hold(self, tensors: Sequence[Tensor]) -> bool:
        """True only if these tensors, as many as those, have the same layouts. It may be False for other reasons: where
        one tensor occurs twice, or autograd treats it otherwise."""
        return self.guards.check(*tensors)


class Among:
    """The layouts of some of those tensors, compared in the same pass: ``stand_ins``, laid out alike, take the
    places of the others."""

    def __init__(self, layouts: Layouts, stand_ins: Sequence[Tensor], present: Sequence[bool]):
        self.layouts = layouts
        self.stand_ins = list(zip(present, stand_ins))

    def hold(self, tensors: Sequence[Tensor]) -> bool:
        here = iter(tensors)
        return self.layouts.hold([next(here) if present else other for present, other in self.stand_ins])
