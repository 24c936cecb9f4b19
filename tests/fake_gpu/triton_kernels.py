"""Triton's kernels, from Triton's own driver and launcher, as PTX on the machine of ``tests/ptx/``."""

from __future__ import annotations

import ctypes
import functools
import gc
import struct
import traceback
from typing import Any
from unittest import mock

from ptx import machine, memory
from ptx.operations import bits_of
from ptx.program import Program, parse
from triton.compiler import CompiledKernel
from triton.runtime import driver

from . import torch_kernels

LAUNCH_FAILED = 719
FLOATS = {4: "<f", 8: "<d"}
binaries: dict[int, bytes] = {}
"""By function of the driver."""


@functools.cache
def program_of(function: int) -> Program:
    binary = binaries[function]
    kernels = (x for x in gc.get_objects() if type(x) is CompiledKernel)
    return parse(next(kernel.asm["ptx"] for kernel in kernels if kernel.asm.get("cubin") == binary))


def arguments_of(program: Program, params: Any) -> list[Any]:
    """Numbers and addresses, from where the launcher put them."""
    values = []
    for pointer, (_, kind) in zip(params, program.params):
        raw = ctypes.string_at(pointer, bits_of(kind) // 8)
        number = (
            struct.unpack({4: "<f", 8: "<d"}[len(raw)], raw)[0] if kind[0] == "f" else int.from_bytes(raw, "little")
        )
        values.append(number)
    return values


def run(*what: Any) -> None:
    with mock.patch.object(memory.Global, "device_type", "cuda"):
        machine.launch(*what)


@ctypes.CFUNCTYPE(ctypes.c_int, *[ctypes.c_long, *[ctypes.c_int] * 4, ctypes.c_long, ctypes.POINTER(ctypes.c_void_p)])
def runs(function, grid, threads, shared, cooperative, stream, params):
    try:
        program = program_of(function)
        launch = functools.partial(run, program, grid, arguments_of(program, params), shared)
        if torch_kernels.current:
            torch_kernels.current[-1].append(launch)
        else:
            launch()
    except BaseException:
        # Nothing that is raised here reaches the test, but this error does.
        traceback.print_exc()
        return LAUNCH_FAILED
    return 0


def install() -> None:
    utils = driver.active.utils
    load = utils.load_binary

    def load_binary(name: str, binary: bytes, shared: int, device: int) -> tuple:
        found = load(name, binary, shared, device)
        binaries[found[1]] = binary
        return found

    utils.load_binary = load_binary
    where = ctypes.c_void_p.in_dll(ctypes.CDLL("libcuda.so.1"), "runs")
    where.value = ctypes.cast(runs, ctypes.c_void_p).value
