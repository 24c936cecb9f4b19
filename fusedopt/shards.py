"""Distributed parameters (DTensor), and what of them lies on this rank.

A step works on the local parts, in place: FSDP gathers weights from the memory behind them, not from the
parameters, so a part that is moved is silently no longer trained. A state is distributed like its parameter and has
memory of its own, since torch.distributed.checkpoint takes a DTensor over part of a larger storage for a plain tensor.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from itertools import compress
from operator import attrgetter, is_, mul
from typing import Any

import torch
from torch import Tensor

PLAIN = (Tensor, torch.nn.Parameter)

# Not to_local(), which costs five times as much and returns the same tensor.
get_local = attrgetter("_local_tensor")
get_spec = attrgetter("_spec")


def is_distributed(tensor: Any) -> bool:
    if type(tensor) in PLAIN:
        return False
    # A program that has not imported it, which takes a second, has no DTensor.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def any_distributed(tensors: Sequence[Any]) -> bool:
    return any(kind not in PLAIN for kind in set(map(type, tensors))) and any(map(is_distributed, tensors))


def is_piece(p: Any) -> bool:
    """Whether it is this rank's piece of a flat parameter of FullyShardedDataParallel (FSDP1): a plain tensor, but for
    torch's mark."""
    return hasattr(p, "_fsdp_flattened")


def local(tensor: Any) -> Any:
    """The part of a DTensor on this rank; anything else as it is."""
    return get_local(tensor) if is_distributed(tensor) else tensor


def first_element(p: Any) -> int:
    """The number that the first element of a DTensor's part on this rank has among all."""
    find = sys.modules["torch.distributed.tensor._utils"].compute_local_shape_and_global_offset
    _, offsets = find(p.shape, p.device_mesh, p.placements)
    return sum(map(mul, offsets, p.stride()))


def like(whole: Any, part: Tensor) -> Any:
    """``part`` as it is, or, beside a DTensor, as this rank's part of another that is distributed in the same way."""
    if not is_distributed(whole):
        return part
    module = sys.modules["torch.distributed.tensor"]
    spec = whole.device_mesh, whole.placements
    return module.DTensor.from_local(part, *spec, run_check=False, shape=whole.shape, stride=whole.stride())


def distributed_alike(a: Any, b: Any) -> bool:
    """Whether two tensors are distributed in the same way, or neither is, so that their local parts belong together."""
    return on_one_mesh(a, b) and (not is_distributed(a) or a._spec is b._spec or a.placements == b.placements)


def on_one_mesh(a: Any, b: Any) -> bool:
    """Whether two tensors are distributed over the same ranks, or neither is: torch copies one into the other."""
    if not (is_distributed(a) and is_distributed(b)):
        return is_distributed(a) == is_distributed(b)
    return a._spec.mesh is b._spec.mesh or a.device_mesh == b.device_mesh


def kind(tensor: Any) -> str:
    """How an error message calls it."""
    name = type(tensor).__name__
    return f"{name} with the placements {tensor.placements} on {tensor.device_mesh}" if is_distributed(tensor) else name


def gather_anew(params: Iterable[Any]) -> None:
    """Let fully_shard gather the weights again whose local parts were written outside a step. What a forward pass has
    gathered it keeps, without a backward pass, for the next one: by default in the outermost module."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None or not any(map(is_distributed, params)):
        return
    # A parameter does not know its module. One of another model is gathered again, too.
    managed = list(sys.modules["torch.distributed._composable_state"]._module_state_mapping)
    for module in managed:
        if isinstance(module, fsdp.FSDPModule):
            module.reshard()


def local_grads(params: list[Tensor], grads: list[Tensor | None]) -> list[Tensor | None]:
    """Each gradient's local part, distributed like its parameter. Sequence parallelism leaves sums to be taken
    (Partial): every rank takes part in that, and ``p.grad`` stays as it was."""
    simply = _parts_of_alike(params, grads)
    if simply is not None:
        return simply
    found = []
    for position, (p, g) in enumerate(zip(params, grads)):
        if is_distributed(g) and is_distributed(p):
            g = get_local(g if distributed_alike(p, g) else _redistributed(p, g, position))
            # What a collective operation of torch's has not delivered yet.
            g = g.wait() if type(g) is not Tensor and hasattr(g, "wait") else g
        elif g is not None and is_distributed(p) != is_distributed(g):
            raise RuntimeError(
                f"parameter {position} is a {type(p).__name__} and its gradient a {type(g).__name__}: "
                "both must be distributed, or neither"
            )
        found.append(g)
    return found


def _parts_of_alike(params: list[Tensor], grads: list[Tensor | None]) -> list[Tensor | None] | None:
    """The local parts, by a few passes of C code, where every gradient has arrived, and has its parameter's own spec,
    as engines leave it. None where one must be looked at."""
    present = [g is not None for g in grads]
    owners, here = list(compress(params, present)), list(compress(grads, present))
    if len({*map(type, owners), *map(type, here)}) != 1 or not is_distributed(here[0]):
        return None
    parts = list(map(get_local, here))
    if set(map(type, parts)) != {Tensor} or not all(map(is_, map(get_spec, owners), map(get_spec, here))):
        return None
    following = iter(parts)
    return [next(following) if there else None for there in present] if len(here) < len(grads) else parts


def refuse_partial(p: Any) -> None:
    if any(placement.is_partial() for placement in p._spec.placements):
        raise RuntimeError(
            f"a parameter of shape {tuple(p.shape)} has the placements {p.placements}: a sum that is still to be taken "
            "cannot be updated; redistribute the parameter"
        )


def _redistributed(p: Any, g: Any, position: int) -> Any:
    refuse_partial(p)
    if g.device_mesh != p.device_mesh:
        raise RuntimeError(
            f"the gradient of parameter {position} lies on {g.device_mesh}, the parameter on {p.device_mesh}; "
            "bring the gradient to the parameter's mesh before step()"
        )
    return g.redistribute(placements=p.placements)


class Shards:
    """The distributed tensors of a plan: whether their local parts still are the ones that it was made for, and those
    of states where they were. Where parameters must lie is for the executors to say (``Plan.note_memory``)."""

    def __init__(self, params: list[Any], states: Iterable[Any]):
        self.params = params
        self.parts_of_params = list(map(get_local, params))
        self.hold_states(states)

    def hold_states(self, states: Iterable[Any]) -> None:
        """``states`` as they are now, in place of others."""
        self.wholes = [*self.params, *states]
        self.states = list(map(get_local, self.wholes[len(self.params) :]))
        self.parts = self.parts_of_params + self.states
        self.addresses = list(map(Tensor.data_ptr, self.states))

    def hold(self) -> bool:
        return (
            all(map(is_, map(get_local, self.wholes), self.parts))
            and list(map(Tensor.data_ptr, self.states)) == self.addresses
        )
