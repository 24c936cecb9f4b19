"""Host time of ``step()``: everything before and around the launches, which do nothing here.

    python bench/host.py [--counts 300 1000] [--optimizers AdamW SGD ...] [--rounds 60]

Ours: the Triton backend on CPU tensors, with Triton's own binder and handles over a driver that launches nothing.
torch's: ``fused`` and ``foreach``, with ``torch._fused_*`` and ``torch._foreach_*`` replaced by functions that do
nothing, and ``clip_grad_norm_`` before them where clipping is on. Gradients lie at other addresses at every step, as
backward leaves them; setting them is not counted. Microseconds of the process: medians of interleaved rounds and, in
brackets, the least, which other processes on the machine disturb least.

On a GPU, where the launches are real and nobody waits for them: ``python bench/gpu.py``.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from unittest import mock

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

import fusedopt
from fusedopt import backends

BUDGET = {300: 170, 1000: 550}
"""Microseconds for plain parameters, all checks and clipping included."""

OPTIONS = {"SGD": {"momentum": 0.9}, "RMSprop": {"momentum": 0.9}}
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


class Case:
    """One optimizer over tensors of its own, and its times."""

    def __init__(self, name: str, count: int, clip: bool, **choice: object):
        self.ours, self.foreach = "backend" in choice, "foreach" in choice
        # Biases and weights of small layers: no parameter is aligned or sized like another.
        shapes = [(16, 16) if k % 2 else (65,) for k in range(count)]
        self.params = [torch.nn.Parameter(torch.ones(shape)) for shape in shapes]
        self.grads = [[torch.ones(shape) for shape in shapes] for _ in range(2)]
        self.max_norm = MAX_NORM if clip and not self.ours else None
        cls = getattr(fusedopt if self.ours else torch.optim, name)
        settings = {"max_grad_norm": MAX_NORM} if clip and self.ours else {}
        self.optimizer = cls(self.params, lr=1e-3, **OPTIONS.get(name, {}), **settings, **choice)
        self.times: list[float] = []

    def step(self, turn: int) -> float:
        for p, g in zip(self.params, self.grads[turn % 2]):
            p.grad = g
        with contextlib.nullcontext() if self.ours else torch_launches_nothing(steps_on_host=self.foreach):
            start = time.process_time()
            if self.max_norm is not None:
                torch.nn.utils.clip_grad_norm_(self.params, self.max_norm, foreach=True)
            self.optimizer.step()
            return (time.process_time() - start) * 1e6


def cases(name: str, count: int, clip: bool) -> dict[str, Case]:
    candidates: dict[str, Callable[[], Case]] = {
        "fusedopt": lambda: Case(name, count, clip, backend="triton"),
        "flatten": lambda: Case(name, count, clip, backend="triton", flatten=True),
        "torch fused": lambda: Case(name, count, clip, fused=True),
        "torch foreach": lambda: Case(name, count, clip, foreach=True),
    }
    made = {}
    for label, make in candidates.items():
        # torch has no such class, or no such implementation of it.
        with contextlib.suppress(TypeError, AttributeError, RuntimeError):
            made[label] = make()
    return made


def measure(name: str, count: int, clip: bool, rounds: int) -> dict[str, str]:
    made = cases(name, count, clip)
    for turn in range(rounds + 4):  # the first ones compile, plan and make states
        for case in made.values():
            case.times.append(case.step(turn))
    return {label: f"{statistics.median(c.times[4:]):.0f} ({min(c.times[4:]):.0f})" for label, c in made.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", nargs="+", type=int, default=[300, 1000], help="numbers of parameters")
    parser.add_argument("--optimizers", nargs="+", choices=sorted(fusedopt.registry), default=sorted(fusedopt.registry))
    parser.add_argument("--rounds", type=int, default=60)
    options = parser.parse_args()
    torch.set_num_threads(1)
    driver.set_active(NoGPU())
    backends._device_problem = lambda device, requested: None  # CPU tensors are taken for those of the GPU
    labels = ("fusedopt", "flatten", "torch fused", "torch foreach")
    print(f"{'optimizer':10} params  clip  budget" + "".join(f"{label:>16}" for label in labels))
    for name in options.optimizers:
        for count in options.counts:
            for clip in (False, True):
                times = measure(name, count, clip, options.rounds)
                row = "".join(f"{times.get(label, '-'):>16}" for label in labels)
                print(f"{name:10} {count:6}  {'yes' if clip else 'no':4}  {BUDGET.get(count, ''):>6}{row}", flush=True)


if __name__ == "__main__":
    main()
