"""Launch what the optimizers launch, through Triton's real launcher, on a CUDA driver that does nothing.

A program of its own, started by test_launch.py with ``tests/fake_gpu/driver.c`` in the driver's place. Every case takes
a step by Triton's binder, and the same step by the kept handle: what arrives at the driver is printed as JSON.
"""

import ctypes
import json

import torch
import triton
import without_dynamo
from fusedopt.kernels import tuning
from rule_cases import optimizer, parameters, set_gradients, tensors
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia
from triton.runtime import driver

from fusedopt import backends, launch, triton_probe

STREAM = 77

SIZES = {"i1": 1, "i32": 4, "i64": 8, "fp32": 4, "fp64": 8}


class Record(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_long) for name in ("function", "stream")),
        *((name, ctypes.c_int) for name in ("grid", "threads", "shared", "cooperative", "count")),
        ("values", ctypes.c_uint64 * 64),
    )


class StubDriver(nvidia.CudaDriver):
    def __init__(self):
        self.utils = nvidia.CudaUtils()
        self.launcher_cls = nvidia.CudaLauncher

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return STREAM


def leaves(types):
    for x in types:
        if isinstance(x, (tuple, list)):
            yield from leaves(x)
        elif x != "constexpr":
            yield 8 if x[0] == "*" else SIZES[x]


def learn_arguments(stub, launches):
    """Tell the driver how long the arguments of each kernel are, so that it can read them."""
    for compiled, _, _ in launches.known.values():
        sizes = list(leaves(compiled.src.signature.values()))
        stub.expect(ctypes.c_long(compiled.function), len(sizes), (ctypes.c_int * len(sizes))(*sizes))


def launched(stub, records, step):
    before = ctypes.c_int.in_dll(stub, "launched").value
    step()
    found = records[before : ctypes.c_int.in_dll(stub, "launched").value]
    return [
        {name: getattr(r, name) for name, _ in Record._fields_ if name != "values"} | {"values": r.values[: r.count]}
        for r in found
    ]


SETTINGS = {
    "plain": {},
    "all": {"max_grad_norm": 1.0, "max_grad_value": 0.1, "weight_decay": 0.1, "maximize": True, "ema_decay": 0.9},
    "scaler": {"skip_nonfinite": True},
    "at once": {"max_grad_norm": 1.0, "launches": 1},
}


RUNS = [("adam", "scattered", "plain"), ("sgd", "scattered", "scaler"), ("amsgrad", "flat", "all")]
RUNS += [("adam", "scattered", "at once")]
"""No states and three, chains that are empty and full, every kernel, arguments that are None and not."""


def main():
    without_dynamo.prepare()
    driver.set_active(StubDriver())
    backends._device_problem = lambda device, requested: None
    stub = ctypes.CDLL("libcuda.so.1")
    records = (Record * 1024).in_dll(stub, "launches")
    report = {"triton": triton.__version__, "problem": triton_probe.problem(torch.device("cpu"))}
    for case, address, label in RUNS:
        settings = SETTINGS[label]
        ctypes.c_int.in_dll(stub, "launched").value = 0
        params = parameters([5000, 33], "cpu")
        made = optimizer(case, params, address, **settings)
        if label == "scaler":
            made.grad_scale, made.found_inf = torch.full((1,), 8.0), torch.zeros(1)
        set_gradients(params, tensors([5000, 33], "cpu"))
        for _ in range(2):  # the first step of momentum is another
            made.step()
        (executor,) = made._engine.executors
        learn_arguments(stub, executor.launch)
        direct = launched(stub, records, made.step)
        launch.DIRECT = False
        executor.launch.known.clear()
        bound = launched(stub, records, made.step)
        launch.DIRECT = True
        report[f"{case}, {address}, {label}"] = [direct, bound]
    report["refused"] = refused(stub, records)
    print(json.dumps(report))


def refused(stub, records):
    """What an optimizer does whose cooperative launches the driver refuses: with "auto", launches of two steps; with 1,
    its error."""
    ctypes.c_int.in_dll(stub, "refuses_cooperative").value = 1
    row = tuning.TABLE["sm_90"]
    tuning.TABLE["sm_90"] = row._replace(launches=1)
    found = []
    for launches in ("auto", 1):
        ctypes.c_int.in_dll(stub, "launched").value = 0
        params = parameters([5000, 33], "cpu")
        made = optimizer("adam", params, "scattered", max_grad_norm=1.0, launches=launches)
        set_gradients(params, tensors([5000, 33], "cpu"))
        try:
            found.append([launched(stub, records, made.step) for _ in range(2)])
        except RuntimeError as error:
            found.append([str(error), ctypes.c_int.in_dll(stub, "launched").value])
    return found


if __name__ == "__main__":
    main()
