"""How many programs of a kernel run at the same time: the largest grid of a cooperative launch.

A larger one is refused by the driver, and one that got through would wait for ever; so this is a lower bound.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

PARTITIONS = 4
"""Schedulers of an NVIDIA multiprocessor, each with its own warps and a quarter of the registers."""

REGISTERS_AT_ONCE = 256
"""Registers are given to warps in such pieces."""

SHARED_AT_ONCE = 1024
"""Bytes of shared memory: what a program may get more than it asked for."""

PROGRAMS = 16
"""Programs that a multiprocessor of any generation can hold."""


class Multiprocessors(NamedTuple):
    """The multiprocessors of a GPU, and what each of them has."""

    count: int
    threads: int
    registers: int
    shared: int


def multiprocessors(device: torch.device) -> Multiprocessors:
    if device.type != "cuda":
        return Multiprocessors(1, 2048, 65536, 65536)
    found = torch.cuda.get_device_properties(device)
    return Multiprocessors(
        found.multi_processor_count,
        found.max_threads_per_multi_processor,
        found.regs_per_multiprocessor,
        found.shared_memory_per_multiprocessor,
    )


def resident_programs(compiled: Any, on: Multiprocessors) -> int:
    """How many programs of a compiled kernel one multiprocessor surely holds at a time."""
    warps = compiled.metadata.num_warps
    if compiled.metadata.target.backend != "cuda":
        return 1
    registers = -(-max(compiled.n_regs, 1) * 32 // REGISTERS_AT_ONCE) * REGISTERS_AT_ONCE
    by_registers = on.registers // PARTITIONS // registers * PARTITIONS // warps
    by_threads = on.threads // (32 * warps)
    by_shared = on.shared // (compiled.metadata.shared + SHARED_AT_ONCE)
    return min(PROGRAMS, by_registers, by_threads, by_shared)


def grid(slots: int, per_multiprocessor: int, count: int) -> int:
    """The number of programs that share ``slots`` most evenly, of as many as fit."""
    most = min(slots, per_multiprocessor * count)
    rounds = -(-slots // most)
    return -(-slots // rounds)


def largest_grid(compiled: Any, device: torch.device, slots: int, most: int) -> int:
    """The grid of a cooperative launch, with ``most`` programs per multiprocessor. RuntimeError if none fits."""
    on = multiprocessors(device)
    fitting = min(most, resident_programs(compiled, on))
    if fitting == 0:
        raise RuntimeError(
            f"a cooperative launch of {compiled.metadata.name}, of which no program fits a multiprocessor of {device}"
        )
    return grid(slots, fitting, on.count)
