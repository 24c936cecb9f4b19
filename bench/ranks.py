"""What a step costs one rank, by the number of ranks, counted in a single process that takes itself for one of them.

    python bench/ranks.py [--ranks 8 64 512 4096] [--cases gpt2/fully_shard/float32 ...] [--save] [--note TEXT]

torch's "fake" process group lets a process be the first or the last of N ranks: meshes, shards and collectives are
made as on N machines, and nothing travels. So this counts: the parameters and elements that the rank holds, the bytes
of its states and of what it sends to its GPU, launches, collectives and their bytes. It times the host, around launches
that do nothing and collectives that return at once. How long a real all_reduce takes is not measured, and nothing is
trained here. ``--save`` appends rows to ``history.csv``.

A case is MODEL/LAYOUT/DTYPE. Models: shapes of ``shapes.py``, or a number of tensors of which every rank has a row of
three elements. Layouts: "fully_shard" over all ranks; "hybrid", copies of the model on every 8 ranks;
"tensor-parallel", fully_shard over tensor parallelism of 8 ranks. float32 is AdamW as it is, bfloat16 with split
masters and 8-bit states.
"""

from __future__ import annotations

import argparse
import gc
import pathlib
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

import history
import host
import shapes
import torch
import torch.distributed as dist
from device import surroundings
from scale import SIZE, seconds
from sent import Sent, counted
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import driver

import fusedopt
from fusedopt import backends
from fusedopt.__main__ import amount
from fusedopt.shards import local

NODE = 8
"""Ranks over which tensor parallelism, and with hybrid sharding one copy of the model, is spread."""

CASES = (
    "gpt2/fully_shard/float32", "gpt2/hybrid/float32", "gpt2/tensor-parallel/float32", "gpt2/fully_shard/bfloat16",
    "1000/fully_shard/float32", "10000/fully_shard/float32", "100000/fully_shard/float32",
)  # fmt: skip

TURNS = 5
"""Steps that are timed."""

FORMS = {"float32": {}, "bfloat16": {"master": "split", "state_dtype": "8bit"}}
"""Dtypes of parameters, and how AdamW keeps its states beside them."""

ASKS = {"max_grad_norm": 1.0, "track": "total", "cautious": True}
"""Settings for which ranks must communicate."""


class Collectives(TorchDispatchMode):
    """Takes note of every collective operation within."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            given = args[0] if isinstance(args[0], (list, tuple)) else [args[0]]
            self.bytes.append(sum(x.nbytes for x in given))
        return func(*args, **(kwargs or {}))


class Case(NamedTuple):
    model: str
    layout: str
    dtype: str


class Rank(NamedTuple):
    """What one rank has and does."""

    sizes: list[int]
    """Elements that it holds of each parameter."""
    state_bytes: int
    first_sent: int
    """Bytes to the GPU at the first step, at one like the last, and at one with all gradients elsewhere."""
    sent: int
    moved_sent: int
    launches: int
    seconds: float
    moved_seconds: float
    collectives: dict[str, list[int]]
    """Bytes of each collective of a step, by the setting that asks for it."""

    @property
    def tensors(self) -> int:
        """Parameters of which it holds something."""
        return sum(n > 0 for n in self.sizes)

    @property
    def elements(self) -> int:
        return sum(self.sizes)


def mesh_of(layout: str, world: int) -> DeviceMesh:
    if layout == "fully_shard":
        return init_device_mesh("cpu", (world,))
    return init_device_mesh("cpu", (world // NODE, NODE), mesh_dim_names=("across", "within"))


def sharded(shapes_of: list[tuple[int, ...]], layout: str, world: int, dtype: torch.dtype) -> list[nn.Parameter]:
    """Parameters as an engine leaves them."""
    mesh, model = mesh_of(layout, world), nn.Module()
    for number, shape in enumerate(shapes_of):
        p = torch.empty(shape, dtype=dtype, device="meta")
        if layout == "tensor-parallel":
            placement = Shard(0) if len(shape) > 1 else Replicate()
            p = distribute_tensor(p, mesh["within"], [placement])
        model.register_parameter(f"p{number}", nn.Parameter(p))
    fully_shard(model, mesh=mesh["across"] if layout == "tensor-parallel" else mesh)
    return list(model.to_empty(device="cpu").parameters())


def rows_of_three(count: int, layout: str, world: int, dtype: torch.dtype) -> list[nn.Parameter]:
    """The same for many tensors, without what an engine does besides."""
    mesh = mesh_of(layout, world)
    placements = {"fully_shard": [Shard(0)], "hybrid": [Replicate(), Shard(0)], "tensor-parallel": [Shard(0), Shard(1)]}
    parts = (torch.zeros(1, SIZE, dtype=dtype) for _ in range(count))
    return [nn.Parameter(DTensor.from_local(x, mesh, placements[layout], run_check=False)) for x in parts]


def made(case: Case, world: int) -> list[nn.Parameter]:
    dtype = getattr(torch, case.dtype)
    if case.model.isdecimal():
        return rows_of_three(int(case.model), case.layout, world, dtype)
    return sharded([shape for group in shapes.MODELS[case.model] for shape in group], case.layout, world, dtype)


def watched(rank: int, world: int, cases: Sequence[Case]) -> list[Rank]:
    """Be that rank, in a process of its own."""
    torch.set_num_threads(1)
    driver.set_active(host.NoGPU())
    backends._device_problem = lambda device, requested: None  # CPU tensors are taken for those of the GPU
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    return [measured(made(case, world), FORMS[case.dtype]) for case in cases]


def measured(params: list[nn.Parameter], settings: dict[str, Any]) -> Rank:
    optimizer = fusedopt.AdamW(params, max_grad_norm=1.0, backend="triton", **settings)
    grads = [list(map(torch.empty_like, params)) for _ in range(2)]
    gc.collect()

    def step(turn: int) -> tuple[float, Sent]:
        for p, g in zip(params, grads[turn]):
            p.grad = g
        with counted(optimizer) as sent:
            return seconds(optimizer.step), sent

    _, first = step(0)
    same, moved = ([step(turn) for turn in turns] for turns in ([0] * TURNS, [1, 0] * TURNS))
    states = [local(x) for state in optimizer.state.values() for x in state.values()]
    return Rank(
        [local(p).numel() for p in params], sum(x.nbytes for x in states),
        first.bytes, same[-1][1].bytes, moved[-1][1].bytes, same[-1][1].launches,
        statistics.median(t for t, _ in same), statistics.median(t for t, _ in moved),
        {name: communicated(params, name) for name in ASKS},
    )  # fmt: skip


def communicated(params: list[nn.Parameter], setting: str) -> list[int]:
    """The collectives of one step with only that setting."""
    optimizer = fusedopt.AdamW(params, **{setting: ASKS[setting]}, backend="triton")
    optimizer.step()
    with Collectives() as found:
        optimizer.step()
    return found.bytes


def rows(case: Case, world: int, ranks: dict[str, Rank], note: str) -> list[history.Row]:
    """Of the first and the last rank; what they communicate once, since it must be the same."""
    what = {
        **surroundings("cpu"), "model": f"{case.model} {case.layout} {world}", "optimizer": "AdamW",
        "dtype": case.dtype, "amp": False, "note": note,
    }  # fmt: skip
    found = []
    for place, rank in ranks.items():
        step = {
            **what, "tensors": rank.tensors, "elements": rank.elements, "clip": True, "implementation": f"{place} rank",
            "launches": rank.launches, "memory_bytes": rank.state_bytes, "rounds": TURNS,
        }  # fmt: skip
        found += [
            history.Row(**step, part="rank", bytes=rank.sent, host_us=round(rank.seconds * 1e6, 1)),
            history.Row(**step, part="rank, moved", bytes=rank.moved_sent, host_us=round(rank.moved_seconds * 1e6, 1)),
            history.Row(**step, part="rank, first", bytes=rank.first_sent),
        ]
    for name, sizes in ranks["first"].collectives.items():
        counts = {"launches": len(sizes), "bytes": sum(sizes)}
        found.append(
            history.Row(**what, **counts, part="all_reduce", clip=name == "max_grad_norm", implementation=name)
        )
    return found


def line(case: Case, world: int, place: str, rank: Rank) -> str:
    sums = ", ".join(f"{name} {len(sizes)} of {sum(sizes)} B" for name, sizes in rank.collectives.items())
    return (
        f"{'/'.join(case):29} {world:4} ranks, {place:5}: {rank.tensors:6} tensors, {rank.elements:9} elements, "
        f"states {rank.state_bytes:9} B, sent {rank.first_sent:8} / {rank.sent} / {rank.moved_sent:8} B, "
        f"{rank.launches} launches, host {rank.seconds * 1e3:.2f} / {rank.moved_seconds * 1e3:.2f} ms, {sums}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", nargs="+", type=amount, default=[8, 64, 512, 4096], help=f"multiples of {NODE}")
    parser.add_argument("--cases", nargs="+", default=CASES, help="MODEL/LAYOUT/DTYPE")
    parser.add_argument("--note", default="", help="what the rows shall say of the machine's state")
    parser.add_argument("--save", action="store_true", help="append the rows to --out")
    parser.add_argument("--out", type=pathlib.Path, default=history.HISTORY, help="default: bench/history.csv")
    options = parser.parse_args()
    cases = [Case(*case.split("/")) for case in options.cases]
    host.import_for_all()
    for world in options.ranks:
        # A process belongs to one group, and to one rank of it, as long as it lives.
        first, last = (host.alone(watched, rank, world, cases) for rank in (0, world - 1))
        for case, *pair in zip(cases, first, last):
            ranks = dict(zip(("first", "last"), pair))
            for place, rank in ranks.items():
                print(line(case, world, place, rank), flush=True)
            if pair[0].collectives != pair[1].collectives:
                raise AssertionError("the first and the last rank would wait for each other for ever")
            if options.save:
                history.append(rows(case, world, ranks, options.note), options.out)


if __name__ == "__main__":
    main()
