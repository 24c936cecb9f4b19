"""What one call of the fallback's rules works on."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from .buckets import Member
from .cohorts import Cohort
from .rule import Rule


@dataclasses.dataclass(slots=True)
class Run:
    """The tensors of cohorts that are alike, perhaps but for their learning rates: pieces of gathered buffers first,
    then tensors used where they are."""

    cohort: Cohort
    """One of them."""
    params: list[Tensor]
    states: list[list[Tensor]]
    averages: list[list[Tensor]]
    gathered: list[Tensor]
    """The gradients in the scratch buffer that go with the first parameters."""
    direct: list[Member]
    """The members whose own gradients go with the other parameters."""
    blocks: list[list[tuple[Tensor, ...]]] = dataclasses.field(default_factory=list)
    """For each parameter, its blocks, its states' and its averages', by memory; none with a fused kernel."""
    members: list[Member] = dataclasses.field(default_factory=list)
    """In the order of their elements in ``params``."""
    sizes: list[list[int]] = dataclasses.field(default_factory=list)
    """For each of ``params``, how many elements the parameters have of which it is made."""
    grads: list[Tensor] = dataclasses.field(default_factory=list)
    groups: list[tuple[dict[str, Any], int]] = dataclasses.field(default_factory=list)
    """The parameter groups of the parameters, and how many of them in a row belong to each."""

    def arguments_of(self, rule: Rule) -> Iterator[list]:
        """What the rule's ``fused`` takes beside its usual arguments."""
        if rule.takes_rates:
            yield [lr for group, count in self.groups for lr in [float(group["lr"])] * count]
        if rule.takes_sizes:
            yield self.sizes
