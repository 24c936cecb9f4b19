"""Which parameter groups have the same options but for the learning rate, so that one evaluation of a formula serves
them: layer-wise learning rates make hundreds of groups."""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from operator import itemgetter
from typing import Any

from .identity import same_tensors

NOT_READ = frozenset(("params", "param_names", "foreach", "fused"))
"""Keys of a group that have no part in any formula."""

RATE = NOT_READ | {"lr"}
"""``NOT_READ`` and the learning rate."""

ASIDE = RATE | {"initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum", "swa_lr"}
"""``RATE`` and what schedulers keep there for themselves: no formula of the package reads it."""


class Shared(dict):
    """The options that some groups have in common. A formula that asks for a key in which groups may differ, such as
    ``initial_lr``, gets a KeyError, and not the first group's value."""

    def get(self, key: str, default: Any = None) -> Any:
        return self[key] if key in ASIDE else super().get(key, default)


class Options:
    """The options of some groups without the keys ``aside``, and which groups agree in them, asked at every step."""

    def __init__(self, groups: Sequence[dict[str, Any]], aside: Set[str] = ASIDE):
        self.groups = groups
        self.aside = aside
        self.lengths: list[int] = []
        self.read: Callable[[dict[str, Any]], tuple] | None = None
        self.values: list[tuple] = []
        self.alike: list[int] = []

    def in_common(self, group: dict[str, Any]) -> dict[str, Any]:
        """A group's options without those aside: what it has in common with all groups that are alike."""
        kind = Shared if self.aside == ASIDE else dict
        return kind({key: value for key, value in group.items() if key not in self.aside})

    def first_alike(self) -> list[int]:
        """For each group the number of the first one with the same options. Tensors, lists and other objects that may
        change count as the same where they are one object."""
        lengths = list(map(len, self.groups))
        if lengths != self.lengths:
            self.lengths, self.read = lengths, self._reader()
        values = list(map(self.read, self.groups))
        if not same_tensors(values, self.values):
            first: dict[Any, int] = {}
            self.values = values
            self.alike = [first.setdefault(_comparable(value), number) for number, value in enumerate(values)]
        return self.alike

    def _reader(self) -> Callable[[dict[str, Any]], tuple]:
        keys = sorted(frozenset().union(*self.groups) - self.aside)
        if len(keys) > 1 and all(group.keys() >= frozenset(keys) for group in self.groups):
            return itemgetter(*keys)
        return lambda group: tuple([group.get(key, NOTHING) for key in keys])


NOTHING = object()


def _comparable(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_comparable, value))
    return value if value is None or isinstance(value, (bool, int, float, str)) else id(value)
