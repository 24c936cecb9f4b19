"""How long a first step compiles for a GPU that is not there, with nothing in Triton's cache: seconds on the clock, and
of this machine's processors, of Python and of the compilers that it starts.

python bench/compile_time.py [TARGET ...] [--kind KIND]          # a line per target; sm_90 and float32 by default

AdamW with clipping: two kernels, or four where small tensors are stored otherwise than large ones, compiled side by
side. A step on a GPU also makes plans and, once per machine, a launcher. One kind per process: the first kernel of all
takes longer.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import absent_gpu
import torch
import triton
from triton import knobs
from triton.runtime import driver

import fusedopt
from fusedopt import backends, launch


def processor_seconds() -> float:
    return sum(os.times()[:4])


KINDS = {
    "float32": (torch.float32, {}),
    "scaler": (torch.float32, {"skip_nonfinite": True}),
    "one launch": (torch.float32, {"launches": 1}),
    "master": (torch.bfloat16, {"master": "fp32", "state_dtype": torch.float32}),
    "8 bits": (torch.bfloat16, {"master": "split8", "state_dtype": "8bit"}),
}
"""What training begins with: dtype of the parameters, and settings."""


def first_step(target: str, kind: str) -> tuple[float, float, list[str]]:
    """(seconds on the clock, of processors, kernels) of one step of a large tensor and a small one."""
    gpu = absent_gpu.NoGPU(target, f"compile time {kind}")
    driver.set_active(gpu)
    dtype, settings = KINDS[kind]
    params = [torch.nn.Parameter(torch.zeros(size, dtype=dtype)) for size in (5000, 33)]
    optimizer = fusedopt.AdamW(params, max_grad_norm=1.0, backend="triton", **settings)
    if kind == "scaler":
        optimizer.grad_scale, optimizer.found_inf = torch.ones(1), torch.zeros(1)
    for p in params:
        p.grad = torch.ones_like(p)
    with tempfile.TemporaryDirectory() as folder, knobs.cache.scope():
        knobs.cache.dir = folder
        start, before = time.perf_counter(), processor_seconds()
        optimizer.step()
        used, passed = processor_seconds() - before, time.perf_counter() - start
        return passed, used, [kernel.metadata.name for kernel in gpu.compiled()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", default=["sm_90"])
    parser.add_argument("--kind", choices=KINDS, default="float32")
    options = parser.parse_args()
    launch.DIRECT = False
    torch.optim.SGD([torch.zeros(1)])  # imports what every optimizer of torch does
    # CPU tensors are taken for those of the GPU.
    backends._device_problem = lambda device, requested: None
    for target in options.targets:
        passed, used, kernels = first_step(target, options.kind)
        times = f"{passed:.2f} s, {used:.2f} s of processors"
        print(f"Triton {triton.__version__}, {target}: {times} for {', '.join(sorted(kernels))}", flush=True)


if __name__ == "__main__":
    main()
