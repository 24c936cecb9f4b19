"""Whether the parameter groups are as a plan found them, asked at every step."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from operator import itemgetter
from typing import Any

from torch import Tensor

from .identity import same, same_tensors
from .options import ASIDE, NOT_READ, Options

get_params = itemgetter("params")


def params_of(optimizer: Any) -> list[Tensor]:
    """The parameters of all groups."""
    return list(chain.from_iterable(map(get_params, optimizer.param_groups)))


class Groups:
    """The parameter groups of an optimizer: which they are, their parameters, and what they ask for.

    Args:
        optimizer: whose groups they are.
        joins: whether those with the same options, or the same but for the learning rate, are updated together, and
            so must go on having the same.
    """

    def __init__(self, optimizer: Any, joins: bool):
        self.groups = list(optimizer.param_groups)
        self.rules = list(map(optimizer.rule, self.groups))
        self.kinds = list(map(_kind, self.groups))
        self.params = list(map(list, map(get_params, self.groups)))
        joins = joins and len(self.groups) > 1
        self.options = [Options(self.groups, aside) for aside in (NOT_READ, ASIDE)] if joins else []
        self.alike = list(map(Options.first_alike, self.options))
        # A user's ``rule()`` may depend on more than settings and groups: it is asked at every step.
        self.asks = not optimizer.rule.__module__.startswith("fusedopt.")
        self.latest = self._copies(self.groups)

    def same(self, others: Groups) -> bool:
        """Whether a plan for those serves these."""
        return (
            same(self.groups, others.groups)
            and same(self.rules, others.rules)
            and self.kinds == others.kinds
            and same_tensors(self.params, others.params)
        )

    def hold(self, optimizer: Any) -> bool:
        """Whether the same plan serves them. Most steps change nothing in a group, or only its learning rate, on which
        no rule of the package depends."""
        groups = optimizer.param_groups
        if not same(groups, self.groups) or list(map(Options.first_alike, self.options)) != self.alike:
            return False
        for group, latest in zip(groups, self.latest):
            if latest is not None and "lr" in group:
                latest["lr"] = group["lr"]
        if same_tensors(groups, self.latest):
            return True
        if (
            not same(list(map(optimizer.rule, groups)), self.rules)
            or list(map(_kind, groups)) != self.kinds
            or not same_tensors(list(map(get_params, groups)), self.params)
        ):
            return False
        self.latest = self._copies(groups)
        return True

    def _copies(self, groups: Sequence[dict[str, Any]]) -> list[dict[str, Any] | None]:
        return [None if self.asks else _copy(group) for group in groups]


def _copy(group: dict[str, Any]) -> dict[str, Any] | None:
    """What is equal to the group until something in it changes; None of what is no plain dict."""
    if type(group) is not dict:
        return None
    return {key: list(value) if type(value) is list else value for key, value in group.items()}


def _kind(group: dict[str, Any]) -> tuple[bool, bool]:
    """What a group asks for beside its rule."""
    return bool(group.get("capturable")), bool(group.get("differentiable"))
