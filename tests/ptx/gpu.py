"""A driver of Triton's that runs what was compiled on the machine."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from absent_gpu import NoGPU

from .machine import launch
from .program import parse

parsed = functools.cache(parse)


class EmulatedGPU(NoGPU):
    """Takes CPU tensors for its own."""

    seed = 0
    """Of the order in which programs take turns."""

    def __init__(self, target: str, label: str):
        super().__init__(target, label)
        gpu = self
        self.launches: list[str] = []
        """The kernels that ran."""

        class Launcher:
            def __init__(self, source: Any, metadata: Any):
                self.source, self.metadata = source, metadata

            def __call__(self, x: int, y: int, z: int, stream: int, function: bytes, *rest: Any) -> None:
                gpu.launches.append(self.metadata.name)
                signature, arguments = list(self.source.signature.values()), rest[4:]
                values = [_bare(value) for value in _run_time(signature, arguments)]
                program = parsed(gpu.text_of(function))
                values += [0] * (len(program.params) - len(values))  # scratch memory that no kernel of ours asks for
                launch(program, x * y * z, values, self.metadata.shared, gpu.seed)

        self.launcher_cls = Launcher

    def text_of(self, binary: bytes) -> str:
        return next(kernel.asm["ptx"] for kernel in self.compiled() if kernel.asm["cubin"] == binary)

    class utils(NoGPU.utils):
        @staticmethod
        def load_binary(name: str, binary: bytes, shared: int, device: Any) -> tuple:
            return None, binary, 64, 0, 1024


def _run_time(signature: Any, arguments: Any) -> Iterator[Any]:
    """The arguments that are not constants, out of all tuples."""
    for kind, value in zip(signature, arguments, strict=True):
        if isinstance(kind, tuple):
            yield from _run_time(kind, value)
        elif kind != "constexpr":
            yield value


def _bare(value: Any) -> Any:
    return value.data_ptr() if isinstance(value, torch.Tensor) else value
