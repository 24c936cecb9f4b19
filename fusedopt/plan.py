"""Which tensors one step reads and writes, worked out once and checked again at every step.

``optimizer.state[p]`` is the truth, as in torch.optim: what somebody loaded or put there is taken over
when the plan is built, and a plan holds only as long as parameters, gradients' layouts and states are
the ones that it was built from.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from itertools import compress
from operator import attrgetter, is_, itemgetter
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import _get_scalar_dtype

from .backends import Backend, backend
from .flat import Space, alias, is_dense
from .rule import Rule

SMALL = 16384
"""Elements below which a CPU spends more on calling an operation than on the numbers."""

FEW = 8
"""Small tensors fewer than this are not worth gathering."""


class NotFusable(Exception):
    """Some parameter needs torch's own step; the message names it and says why."""


@dataclasses.dataclass(slots=True, eq=False)
class Place:
    """Where one parameter's state lives."""

    space: Space
    index: int
    dtypes: dict[str, torch.dtype]
    packed: bool
    views: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    flattened: int | None = None
    """The address to which ``flatten`` moved the parameter, until somebody else moves it."""

    def fits(self, p: Tensor, dtypes: dict[str, torch.dtype], packed: bool) -> bool:
        space, i = self.space, self.index
        if space.device != p.device or space.sizes[i] != p.size() or packed < self.packed:
            return False
        if is_dense(p):
            if space.strides[i] != p.stride():
                return False
        elif packed and not self.packed:
            return False
        return all(self.dtypes.get(key, dtype) == dtype for key, dtype in dtypes.items())


@dataclasses.dataclass(slots=True, eq=False)
class Member:
    """One parameter with a gradient."""

    param: Tensor
    position: int
    """Its gradient's position among this step's gradients."""
    cohort: int
    place: Place


@dataclasses.dataclass(slots=True, eq=False)
class Cohort:
    """The parameters of one group that have been stepped equally often."""

    number: int
    group: dict[str, Any]
    t: int
    """Steps taken."""
    members: list[Member] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(slots=True, eq=False)
class Bucket:
    """What one kernel can update: one device, one set of dtypes, one rule; over all groups."""

    rule: Rule
    device: torch.device
    dtype: torch.dtype
    grad_dtype: torch.dtype
    backend: Backend
    flat: bool
    cohorts: list[Cohort]
    members: list[Member]


class Plan:
    """The buckets of one step, and what must stay as it is for them to be right."""

    def __init__(self, optimizer: Any, places: dict[Tensor, Place]):
        groups = optimizer.param_groups
        self.params = [p for group in groups for p in group["params"]]
        self.group_sizes = [len(group["params"]) for group in groups]
        self.rules = [optimizer.rule(group) for group in groups]
        self.present = [p.grad is not None for p in self.params]
        self.flatten = optimizer.flatten
        self.requested_backend = optimizer.backend

        newcomers = _survey(optimizer, self.rules)
        for stale in set(places).difference(self.params):
            del places[stale]
        self.buckets = [_settle(optimizer, key, entries, places) for key, entries in newcomers.items()]

        members = [member for bucket in self.buckets for member in bucket.members]
        self.active = list(compress(self.params, self.present))
        self.grad_dtypes = [p.grad.dtype for p in self.active]
        self.addresses = list(map(Tensor.data_ptr, self.active))
        self.spaces = list({id(m.place.space): m.place.space for m in members}.values())
        self.steps = [space.buffers["step"] for space in self.spaces if "step" in space.buffers]
        self.stepped = [_stepped(space, members) for space in self.spaces if "step" in space.buffers]
        self.states = list(optimizer.state.values())
        self.views = []
        for bucket in self.buckets:
            dicts = [optimizer.state[m.param] for m in bucket.members] if bucket.rule.states else []
            keys = (*bucket.rule.states, "step") if optimizer.counts_steps else bucket.rule.states
            self.views += [(key, dicts, [m.place.views[key] for m in bucket.members]) for key in keys if dicts]
        self.note_steps()

    def note_steps(self) -> None:
        self.step_values = [steps.tolist() for steps in self.steps]

    def holds(self, optimizer: Any, grads: Sequence[Tensor | None]) -> bool:
        """Whether the same plan serves this step. Runs at every step: about 0.3 us per parameter."""
        groups = optimizer.param_groups
        params = [p for group in groups for p in group["params"]]
        if [len(group["params"]) for group in groups] != self.group_sizes or not _same(params, self.params):
            return False
        if [g is not None for g in grads] != self.present:
            return False
        if optimizer.flatten is not self.flatten or optimizer.backend is not self.requested_backend:
            return False
        if not _same([optimizer.rule(group) for group in groups], self.rules):
            return False
        if list(map(Tensor.data_ptr, self.active)) != self.addresses:
            return False
        if list(map(attrgetter("dtype"), compress(grads, self.present))) != self.grad_dtypes:
            return False
        if any(map(attrgetter("is_sparse"), compress(grads, self.present))):
            return False
        if not _same(list(optimizer.state.values()), self.states):
            return False
        try:
            if not all(all(map(is_, map(itemgetter(key), dicts), views)) for key, dicts, views in self.views):
                return False
        except KeyError:
            return False
        if any(group.get("differentiable") for group in groups):
            return False
        return self.step_values == [steps.tolist() for steps in self.steps]

    def advance(self, by: int) -> None:
        """Count a step that was taken (or take back one that turned out to be skipped)."""
        for bucket in self.buckets:
            for cohort in bucket.cohorts:
                cohort.t += by
        for steps, stepped in zip(self.steps, self.stepped):
            steps.add_(stepped, alpha=by)
        self.note_steps()


def _same(a: list[Any], b: list[Any]) -> bool:
    return len(a) == len(b) and all(map(is_, a, b))


def _stepped(space: Space, members: list[Member]) -> Tensor:
    """1 for each of the space's tensors that takes this step, else 0."""
    stepped = torch.zeros_like(space.buffers["step"])
    stepped[[m.place.index for m in members if m.place.space is space]] = 1
    return stepped


def _survey(optimizer: Any, rules: list[Rule]) -> dict[tuple, list[tuple]]:
    """Every parameter with a gradient, by bucket. Changes nothing, so an error leaves all as it was."""
    buckets: dict[tuple, list[tuple]] = {}
    position = 0
    for number, (group, rule) in enumerate(zip(optimizer.param_groups, rules)):
        for p in group["params"]:
            g = p.grad
            position += 1
            if g is None:
                continue
            where = f"parameter {position - 1} (group {number}, shape {tuple(p.shape)})"
            if reason := _not_fusable(p, g, group):
                raise NotFusable(f"{reason} ({where})")
            if g.device != p.device:
                raise RuntimeError(f"the gradient of {where} is on {g.device}, the parameter on {p.device}")
            if g.shape != p.shape:
                raise RuntimeError(f"the gradient of {where} has shape {tuple(g.shape)}")
            state = optimizer.state.get(p, {})
            dtypes = {key: _state_dtype(p, state.get(key), key, where) for key in rule.states}
            taken = _steps_taken(optimizer, rule, state, where)
            choice = backend(p.device, optimizer.backend)
            key = (p.device, p.dtype, g.dtype, rule, choice, tuple(dtypes.values()))
            buckets.setdefault(key, []).append((p, position - 1, number, group, taken, dtypes))
    return buckets


def _not_fusable(p: Tensor, g: Tensor, group: dict[str, Any]) -> str | None:
    if group.get("differentiable"):
        return "differentiable=True"
    if g.layout is not torch.strided:
        return "a sparse gradient"
    if p.is_complex():
        return "a complex parameter"
    if p.is_meta:
        return "a parameter on the meta device"
    if not p.is_floating_point() or not g.is_floating_point():
        return f"a parameter of dtype {p.dtype}"
    if type(p) not in (Tensor, torch.nn.Parameter) or type(g) is not Tensor:
        return f"a tensor subclass ({type(p).__name__} with a gradient of {type(g).__name__})"
    return None


def _state_dtype(p: Tensor, value: Any, key: str, where: str) -> torch.dtype:
    if value is None:
        return p.dtype
    if not isinstance(value, Tensor):
        raise RuntimeError(f"the state {key!r} of {where} must be a tensor, got {type(value).__name__}")
    if value.shape != p.shape:
        raise RuntimeError(f"the state {key!r} of {where} has shape {tuple(value.shape)}")
    if value.device != p.device:
        raise RuntimeError(
            f"the state {key!r} of {where} is on {value.device}, the parameter on {p.device}; "
            "move the model before the first step, or load the state_dict again after moving it"
        )
    return value.dtype


def _steps_taken(optimizer: Any, rule: Rule, state: dict[str, Any], where: str) -> int:
    if not optimizer.counts_steps:
        # Only whether the buffers were ever written matters.
        return int(all(state.get(key) is not None for key in rule.states)) if rule.states else 0
    step = state.get("step", 0)
    try:
        return int(step)
    except (TypeError, ValueError, RuntimeError) as error:
        raise RuntimeError(f"the state 'step' of {where} must be a number, got {step!r}") from error


def _settle(optimizer: Any, key: tuple, entries: list[tuple], places: dict[Tensor, Place]) -> Bucket:
    """Give every parameter of a bucket its place, and its state the place's memory."""
    device, dtype, grad_dtype, rule, choice, _ = key
    irregular = [choice.name == "torch" and not is_dense(p) for p, *_ in entries]
    small = [choice.name == "torch" and device.type == "cpu" and p.numel() < SMALL for p, *_ in entries]
    packed = irregular if sum(small) < FEW else [a or b for a, b in zip(irregular, small)]

    homeless = [
        (entry, pack)
        for entry, pack in zip(entries, packed)
        if entry[0] not in places or not places[entry[0]].fits(entry[0], entry[5], pack)
    ]
    if homeless:
        # Small ones first, and group by group, so that each cohort's lie side by side.
        homeless.sort(key=lambda pair: not pair[1])
        space = Space([entry[0] for entry, _ in homeless], packed=sum(pack for _, pack in homeless))
        for index, ((p, *_, dtypes), pack) in enumerate(homeless):
            places[p] = Place(space, index, dict(dtypes), pack)

    flattened = optimizer.flatten and _flatten([places[p] for p, *_ in entries], [p for p, *_ in entries])
    cohorts: dict[tuple[int, int], Cohort] = {}
    members = []
    for p, position, number, group, taken, dtypes in entries:
        place = places[p]
        _adopt_states(optimizer, p, group, place, rule, dtypes, taken)
        cohort = cohorts.setdefault((number, taken), Cohort(len(cohorts), group, taken))
        member = Member(p, position, cohort.number, place)
        cohort.members.append(member)
        members.append(member)
    return Bucket(rule, device, dtype, grad_dtype, choice, flattened, list(cohorts.values()), members)


def _adopt_states(
    optimizer: Any, p: Tensor, group: dict, place: Place, rule: Rule, dtypes: dict[str, torch.dtype], taken: int
) -> None:
    """Make ``optimizer.state[p]`` hold views of the place, with the values that it has now."""
    if not rule.states:
        return
    state = optimizer.state[p]
    if optimizer.counts_steps:
        _adopt(place, state, "step", _get_scalar_dtype(), float(taken))
    for key in rule.states:
        _adopt(place, state, key, dtypes[key], optimizer.initial_value(group, key))


def _adopt(place: Place, state: dict[str, Any], key: str, dtype: torch.dtype, initial: float) -> None:
    value = state.get(key)
    if value is not None and value is place.views.get(key):
        return
    space = place.space
    if key not in place.views:
        if key == "step":
            if key not in space.buffers:
                space.buffers[key] = torch.zeros(len(space.sizes), dtype=dtype)
            place.views[key] = alias(space.buffers[key][place.index])
        else:
            if key not in space.buffers:
                space.allocate(key, dtype)
            place.views[key] = alias(space.view(key, place.index))
        place.dtypes.setdefault(key, dtype)
    view = place.views[key]
    if isinstance(value, Tensor):
        view.copy_(value.detach())
    else:
        view.fill_(initial)
    state[key] = view


def _flatten(places: list[Place], params: list[Tensor]) -> bool:
    """Move parameters into their space's buffer. True if all of them are there, in one space."""
    for p, place in zip(params, places):
        if place.flattened is None and "param" not in place.views and owns_memory(p):
            if "param" not in place.space.buffers:
                place.space.allocate("param", p.dtype)
            view = place.views["param"] = alias(place.space.view("param", place.index))
            view.copy_(p.detach())
            p.data = view
            place.flattened = p.data_ptr()
        elif place.flattened is not None and p.data_ptr() != place.flattened:
            place.flattened = None
    return len({id(place.space) for place in places}) == 1 and all(place.flattened is not None for place in places)


def owns_memory(p: Tensor) -> bool:
    """Whether ``p`` is a plain dense tensor whose storage holds nothing else and is nobody else's."""
    if type(p) not in (Tensor, torch.nn.Parameter) or hasattr(p, "_fsdp_flattened") or not is_dense(p):
        return False
    storage = p.untyped_storage()
    # p itself and the handle just made.
    return storage.nbytes() == p.numel() * p.itemsize and torch._C._storage_Use_Count(storage._cdata) == 2

