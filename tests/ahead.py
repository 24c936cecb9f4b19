"""First steps of optimizers that need several kernels, compiled for a GPU that is not there.

A program of its own, started by test_ahead.py with the names of the cases, the first of which is compiled one by one
too: what was compiled, and where, is printed as JSON.
"""

import hashlib
import json
import sys
import tempfile
import threading
import warnings
from unittest import mock

import absent_gpu
import torch
import triton
import without_dynamo
from triton import AsyncCompileMode, knobs
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime import driver
from triton.runtime.errors import OutOfResources

import fusedopt
from fusedopt import backends, launch, triton_ahead

CASES = {
    "clipped": {"max_grad_norm": 1.0},
    "clipped before": {},
    "8 bits": {"master": "split8", "state_dtype": "8bit", "max_grad_norm": 1.0},
    "capturable": {"max_grad_norm": 1.0, "capturable": True},
    "scaler": {"skip_nonfinite": True},
    "means": {"cautious": True, "max_grad_norm": 1.0},
    "units": {"adaptive_grad_clip": 0.1},
    "tracked": {"track": "total", "max_grad_norm": 1.0},
    "one launch": {"max_grad_norm": 1.0, "launches": 1},
}


def trained(name, folder, steps=1, backend="triton"):
    """Take first steps. Returns their GPU, and the optimizer."""
    gpu = absent_gpu.NoGPU("sm_90", f"{name} {folder}")
    driver.set_active(gpu)
    dtypes = [torch.bfloat16] * 2 if name == "8 bits" else [torch.float32]
    if name == "clipped before":
        dtypes = [torch.float32, torch.bfloat16]
    params = [torch.nn.Parameter(torch.zeros(size, dtype=dtype)) for size, dtype in zip((5000, 33), dtypes)]
    # Whatever compiles soonest.
    optimizer = fusedopt.Lion(params, backend=backend, **CASES[name])
    for p in params:
        p.grad = torch.ones_like(p)
    knobs.cache.dir = folder
    for _ in range(steps):
        if name == "scaler":
            optimizer.grad_scale, optimizer.found_inf = torch.ones(1), torch.zeros(1)
        if name == "clipped before":
            optimizer.clip_grad_norm_(1.0)
        optimizer.step()
    return gpu, optimizer


def binaries(gpu):
    return sorted([k.metadata.name, hashlib.sha256(k.asm["cubin"]).hexdigest()] for k in gpu.compiled())


def report(name, folder):
    """Where the kernels of a first step were compiled, or found in the folder where a case before has left them, which
    ones, what failed beside others, and was compiled alone then, and how many threads are left."""
    where, failed = [], []
    submit = AsyncCompileMode.submit

    def watched(mode, key, compiling, *others):
        def compile():
            try:
                return compiling()
            except Exception as error:
                while error.__cause__ is not None:
                    error = error.__cause__
                failed.append(str(error))
                raise

        return submit(mode, key, compile, *others)

    def listener(**kwargs):
        where.append("alone" if threading.current_thread() is threading.main_thread() else "beside others")

    threads = threading.active_count()
    listening = mock.patch.object(knobs.compilation, "listener", listener)
    with listening, mock.patch.object(AsyncCompileMode, "submit", watched):
        gpu, _ = trained(name, folder)
    counts = {kind: where.count(kind) for kind in ("alone", "beside others")}
    return counts | {"kernels": binaries(gpu), "failed": failed, "threads": threading.active_count() - threads}


def one_by_one(name):
    """The kernels of two steps, each compiled when it is launched."""
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(triton_ahead, "_side_by_side"):
        return binaries(trained(name, folder, steps=2)[0])


def failure():
    """What is said where the compiler fails, by the step that met it; and how many kernels the next step makes."""

    def fail(*args):
        raise RuntimeError("the compiler has failed")

    def step():
        try:
            return len(trained("clipped", folder)[0].compiled())
        except RuntimeError as error:
            return str(error)

    with tempfile.TemporaryDirectory() as folder:
        with mock.patch.object(CUDABackend, "make_cubin", fail):
            said = step()
        return [said, step()]


def without(name, folder):
    """What two steps say, and how much they launch, where the update's kernel cannot be loaded and no backend was asked
    for."""
    utils, launcher, launched = absent_gpu.NoGPU.utils, absent_gpu.NoGPU.launcher_cls, []

    def load_binary(kernel, *args):
        if kernel.startswith("step"):
            raise OutOfResources(300000, 232448, "shared memory")
        return None, None, 0, 0, 1024

    with (
        mock.patch.object(utils, "load_binary", load_binary),
        mock.patch.object(launcher, "__call__", lambda self, *args: launched.append(args)),
        warnings.catch_warnings(record=True) as said,
    ):
        warnings.simplefilter("always")
        _, optimizer = trained(name, folder, steps=2, backend=None)
    return {"said": [str(warning.message) for warning in said], "layout": optimizer.layout(), "launches": len(launched)}


def main(names):
    without_dynamo.prepare()
    launch.DIRECT = False
    backends._device_problem = lambda device, requested: None
    with knobs.cache.scope(), tempfile.TemporaryDirectory() as folder:
        found = {"triton": triton.__version__, "failure": failure()}
        found["first steps"] = {name: report(name, folder) for name in names}
        found["without"] = without("clipped", folder)
        found["one by one"] = one_by_one(names[0])
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
