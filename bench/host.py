"""Host time of ``step()``: everything before and around the launches, which do nothing here.

    python bench/host.py [--counts 300 1000] [--groups 465] [--dtensors 1000] [--optimizers AdamW SGD ...]
                         [--rounds 8] [--passes 3] [--save] [--note TEXT]

Ours: the Triton backend on CPU tensors, with Triton's own binder and handles over a driver that launches nothing.
torch's: ``fused`` and ``foreach``, with ``torch._fused_*`` and ``torch._foreach_*`` replaced by functions that do
nothing, and ``clip_grad_norm_`` before them where clipping is on. Gradients lie at other addresses at every step, as
backward leaves them; setting them is not counted. Each implementation takes some steps in a row, then the next one's
turn comes; each model has a process of its own in each pass, and the pass counts in which an implementation was
fastest: a machine that others use has phases in which everything takes twice as long. Microseconds of the process,
medians: of the steps that follow one of their own and, in brackets, of the first ones of a row, which find the
processor's caches full of the others' tensors. A step of a training is somewhere between. DTensors are shards of one
rank of eight, without the others; torch's implementations, which do most of their work on them between the launches,
are not measured then. ``--save`` appends rows to ``history.csv``.

On a GPU, where the launches are real and nobody waits for them: ``python bench/gpu.py``.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import multiprocessing
import pathlib
import random
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import history
import torch
from device import surroundings
from torch.distributed.device_mesh import DeviceMesh
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.cache import triton_key

import fusedopt
from fusedopt import backends
from fusedopt.__main__ import amount

BUDGET = {"300 tensors": 170, "1000 tensors": 550, "1000 DTensors": 1500}
"""Microseconds, all checks and clipping included."""

IN_A_ROW = 20
"""Steps that an implementation takes before the next one's turn."""

IMPLEMENTATIONS = {
    "fusedopt": {"backend": "triton"},
    "fusedopt flatten": {"backend": "triton", "flatten": True},
    "fused": {"fused": True},
    "foreach": {"foreach": True},
}

OPTIONS = {"SGD": {"momentum": 0.9}, "RMSprop": {"momentum": 0.9}}
LR = 1e-3
MAX_NORM = 1.0
NORM = torch.ones(())


class NoGPU:
    """A GPU for which Triton compiles, and on which nothing runs."""

    class utils:
        @staticmethod
        def get_device_properties(device):
            return {"max_shared_mem": 65536, "multiprocessor_count": 132, "warpSize": 32, "max_num_regs": 65536}

        @staticmethod
        def load_binary(name, binary, shared, device):
            return None, None, 0, 0, 1024  # module, function, registers, spills, threads

    class launcher_cls:
        def __init__(self, source, metadata):
            pass

        def __call__(self, *args):
            pass

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_active_torch_device(self):
        return torch.device("cpu")

    @staticmethod
    def is_active():
        return True


@contextlib.contextmanager
def torch_launches_nothing(steps_on_host: bool) -> Iterator[None]:
    """In-place operations do nothing, others give back what they got. Step counts and their like go on where they are
    numbers on the host: with ``foreach``, but not with ``fused``."""

    def nothing(tensors: list, *args: object, **kwargs: object) -> list:
        return tensors

    def on_numbers(operation: Callable[..., None]) -> Callable[..., None]:
        def act(tensors: list, *args: object, **kwargs: object) -> None:
            if steps_on_host and tensors[0].dim() == 0:
                operation(tensors, *args, **kwargs)

        return act

    def norm(tensors: list, *args: object, **kwargs: object) -> list:
        return [NORM] * len(tensors)

    names = [name for name in dir(torch) if name.startswith(("_foreach_", "_fused_"))]
    real = {name: on_numbers(getattr(torch, name)) for name in ("_foreach_add_", "_foreach_mul_")}
    instead = dict.fromkeys(names, nothing) | real | {"_foreach_norm": norm}
    with mock.patch.multiple(torch, **instead):
        yield


class Model(NamedTuple):
    """That many tensors: "tensors" in one group, "groups" of one tensor with a learning rate of its own each, or
    "DTensors"."""

    count: int
    kind: str

    def __str__(self) -> str:
        return f"{self.count} {self.kind}"


@functools.cache
def mesh() -> DeviceMesh:
    """Eight ranks, of which this is the first and the others are not there."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    return torch.distributed.init_device_mesh("cpu", (8,))


def distributed(part: torch.Tensor) -> torch.Tensor:
    from torch.distributed.tensor import DTensor, Shard

    return DTensor.from_local(part, mesh(), [Shard(0)], run_check=False)


def with_spec_of(p: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    """A gradient as fully_shard makes it: with its parameter's own spec."""
    from torch.distributed.tensor import DTensor

    return DTensor(part, p._spec, requires_grad=False)


class Times(NamedTuple):
    first: list[float]
    """Microseconds of the first step of each turn."""
    later: list[float]
    """And of those that followed."""

    def __str__(self) -> str:
        return f"{statistics.median(self.later):.0f} ({statistics.median(self.first):.0f})"


class Case:
    """One optimizer over tensors of its own, and its times."""

    def __init__(self, name: str, model: Model, clip: bool, **choice: object):
        self.ours, self.foreach = "backend" in choice, "foreach" in choice
        # Biases and weights of small layers: no parameter is aligned or sized like another.
        shapes = [(16, 16) if k % 2 else (65,) for k in range(model.count)]
        tensors = [torch.ones(shape) for shape in shapes]
        if model.kind == "DTensors":
            tensors = list(map(distributed, tensors))
        self.params = list(map(torch.nn.Parameter, tensors))
        self.grads = [[torch.ones(shape) for shape in shapes] for _ in range(2)]
        if model.kind == "DTensors":
            self.grads = [list(map(with_spec_of, self.params, grads)) for grads in self.grads]
        self.max_norm = MAX_NORM if clip and not self.ours else None
        cls = getattr(fusedopt if self.ours else torch.optim, name)
        settings = {"max_grad_norm": MAX_NORM} if clip and self.ours else {}
        groups = [{"params": [p], "lr": LR * (1 + k / model.count)} for k, p in enumerate(self.params)]
        params = groups if model.kind == "groups" else self.params
        self.optimizer = cls(params, LR, **OPTIONS.get(name, {}), **settings, **choice)
        self.times = Times([], [])

    def step(self, number: int) -> float:
        for p, g in zip(self.params, self.grads[number % 2]):
            p.grad = g
        with contextlib.nullcontext() if self.ours else torch_launches_nothing(steps_on_host=self.foreach):
            start = time.process_time()
            if self.max_norm is not None:
                torch.nn.utils.clip_grad_norm_(self.params, self.max_norm, foreach=True)
            self.optimizer.step()
            return (time.process_time() - start) * 1e6

    def turn(self) -> None:
        first, *later = (self.step(number) for number in range(IN_A_ROW))
        self.times.first.append(first)
        self.times.later.extend(later)


def cases(name: str, model: Model, clip: bool) -> dict[str, Case]:
    made = {}
    for label, choice in IMPLEMENTATIONS.items():
        if model.kind == "DTensors" and "backend" not in choice:
            continue
        # torch has no such class, or no such implementation of it.
        with contextlib.suppress(TypeError, AttributeError, RuntimeError):
            made[label] = Case(name, model, clip, **choice)
    return made


def measure(name: str, model: Model, clip: bool, rounds: int) -> dict[str, Times]:
    made = cases(name, model, clip)
    for case in made.values():  # compiles, plans and makes states
        for number in range(IN_A_ROW):
            case.step(number)
    chance = random.Random(0)
    for _ in range(rounds):
        # In a fixed order one would always come after the one that leaves the caches fullest.
        for case in chance.sample(list(made.values()), len(made)):
            case.turn()
    return {label: case.times for label, case in made.items()}


def import_for_all() -> None:
    """What every process would take seconds for after its fork: imports, and to hash Triton's own files."""
    from torch.distributed import tensor  # noqa: F401
    from torch.testing._internal.distributed import fake_pg  # noqa: F401

    from fusedopt import triton_backend  # noqa: F401

    torch.optim.SGD([torch.zeros(1)])
    triton_key()


def alone(function: Callable[..., Any], *args: object) -> Any:
    """What it returns in a process of its own, which has what was imported here."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(function, args)


def quietest(passes: list[dict[str, Times]]) -> dict[str, Times]:
    """Of each implementation the pass in which it was fastest."""
    return {label: min((one[label] for one in passes), key=lambda x: statistics.median(x.later)) for label in passes[0]}


def rows_of(name: str, model: Model, clip: bool, made: dict[str, Times], note: str) -> Iterator[history.Row]:
    for label, (first, later) in made.items():
        for part, times in (("host", later), ("host, caches cold", first)):
            yield history.Row(
                **surroundings(torch.device("cpu")), part=part, model=str(model), tensors=model.count, optimizer=name,
                dtype="float32", clip=clip, implementation=label, host_us=round(statistics.median(times), 1),
                rounds=len(first), note=note,
            )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", nargs="*", type=amount, default=[300, 1000], help="numbers of parameters")
    parser.add_argument("--groups", nargs="*", type=amount, default=[465], help="numbers of groups of one tensor each")
    parser.add_argument("--dtensors", nargs="*", type=amount, default=[1000], help="numbers of distributed parameters")
    parser.add_argument("--optimizers", nargs="+", choices=sorted(fusedopt.registry), default=sorted(fusedopt.registry))
    parser.add_argument("--rounds", type=amount, default=8)
    parser.add_argument("--passes", type=amount, default=3, help="over all cases, one after the other")
    parser.add_argument("--save", action="store_true", help="append the rows to --out")
    parser.add_argument("--out", type=pathlib.Path, default=history.HISTORY, help="default: bench/history.csv")
    parser.add_argument("--note", default="", help="what the rows shall say besides")
    options = parser.parse_args()
    torch.set_num_threads(1)
    driver.set_active(NoGPU())
    backends._device_problem = lambda device, requested: None  # CPU tensors are taken for those of the GPU
    counts = {"tensors": options.counts, "groups": options.groups, "DTensors": options.dtensors}
    import_for_all()
    models = [Model(count, kind) for kind, numbers in counts.items() for count in numbers]
    wanted = [(name, model, clip) for name in options.optimizers for model in models for clip in (False, True)]
    # In memory where others have been, tensors lie scattered, and take longer.
    passes = [{case: alone(measure, *case, options.rounds) for case in wanted} for _ in range(options.passes)]
    print(f"{'optimizer':11} {'model':13}  clip  budget" + "".join(f"{k:>17}" for k in IMPLEMENTATIONS))
    for name, model, clip in wanted:
        made = quietest([one[name, model, clip] for one in passes])
        times = "".join(f"{str(made[k]) if k in made else '-':>17}" for k in IMPLEMENTATIONS)
        print(f"{name:11} {model!s:13}  {'yes' if clip else 'no':4}  {BUDGET.get(str(model), ''):>5}{times}")
        if options.save:
            history.append(rows_of(name, model, clip, made, options.note), options.out)


if __name__ == "__main__":
    main()
