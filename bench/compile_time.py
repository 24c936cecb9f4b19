"""How long a first step compiles for a GPU that is not there, with nothing in Triton's cache: seconds of this machine's
processor, of Python and of the compilers that it starts.

python bench/compile_time.py [TARGET ...]          # prints a line per target and Triton; sm_90 by default

AdamW with clipping in float32: two kernels. A step on a GPU also makes plans and, once per machine, a launcher.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import absent_gpu
import aot
import torch
import triton
from triton import knobs
from triton.runtime import driver

from fusedopt import backends, launch


def processor_seconds() -> float:
    return sum(os.times()[:4])


def first_step(target: str, **settings) -> tuple[float, list[str]]:
    """(seconds, kernels) of one step."""
    gpu = absent_gpu.NoGPU(target, f"compile time {settings}")
    driver.set_active(gpu)
    with tempfile.TemporaryDirectory() as folder, knobs.cache.scope():
        knobs.cache.dir = folder
        before = processor_seconds()
        aot.step_once("adam", "scattered", "float32", weight_decay=0.1, **settings)
        return processor_seconds() - before, [kernel.metadata.name for kernel in gpu.compiled()]


def main() -> None:
    launch.DIRECT = False
    torch.optim.SGD([torch.zeros(1)])  # imports what every optimizer of torch does
    # CPU tensors are taken for those of the GPU.
    backends._device_problem = lambda device, requested: None
    for target in sys.argv[1:] or ["sm_90"]:
        seconds, kernels = first_step(target, max_grad_norm=1.0)
        print(f"Triton {triton.__version__}, {target}: {seconds:.2f} s for {', '.join(sorted(kernels))}", flush=True)


if __name__ == "__main__":
    main()
