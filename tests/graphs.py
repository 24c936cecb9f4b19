"""CUDA graphs for tests: true ones on a GPU, and on a CPU something that behaves like them as far as a step can tell.

What happens while the CPU's graph is captured is written down and not done: kernels, and torch's operations on tensors.
``replay`` repeats it with the same memory. Waiting for the device, which no graph can hold, is an error.
"""

import contextlib
import gc

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from fusedopt import upload
from fusedopt.plan import without_collection


class Recorder(TorchDispatchMode):
    """Writes down what torch is told to do, and does of it what changes nothing."""

    def __init__(self, calls):
        super().__init__()
        self.calls = calls

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        refuse_to_wait(func)
        if func.namespace == "c10d":
            return self.communicate(func, *args, **kwargs)
        if not func._schema.returns:  # what it is about are lists of tensors
            self.calls.append(lambda: func(*args, **kwargs))
            return None
        out = args[0] if func._schema.is_mutable else func(*args, **kwargs)
        if isinstance(out, torch.Tensor):
            self.calls.append(lambda: again(func, args, kwargs, out))
        return out

    def communicate(self, func, tensors, *args, **kwargs):
        """Every rank captures, so that they meet here, with copies, and again at every replay."""
        self.calls.append(lambda: func(tensors, *args, **kwargs)[-1].wait())
        return func([x.clone() for x in tensors], *args, **kwargs)


class Waits(TorchDispatchMode):
    """No operation within may need a number of the device."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        refuse_to_wait(func)
        return func(*args, **(kwargs or {}))


def refuse_to_wait(func):
    if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default):
        raise RuntimeError("operation not permitted when stream is capturing: somebody waits for the device")


def again(func, args, kwargs, out):
    found = func(*args, **kwargs)
    old = [x.untyped_storage().data_ptr() for x in args if isinstance(x, torch.Tensor)]
    if not func._schema.is_mutable and out.untyped_storage().data_ptr() not in old:
        out.copy_(found)


class Graph:
    """Of a CPU."""

    def __init__(self):
        self.calls = []

    @torch.no_grad()
    def replay(self):
        for call in self.calls:
            call()


@contextlib.contextmanager
def capture(monkeypatch, executors):
    """Yields a graph of what happens within; ``executors`` of the optimizers that take a step in it."""
    if torch.cuda.is_available():
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        # Pinned memory of an earlier graph that is found to be garbage within is freed behind an event that this one
        # holds, and for which torch then asks in vain.
        gc.collect()
        try:
            with without_collection(), torch.cuda.graph(graph):
                yield graph
        finally:
            torch.cuda.set_stream(stream)  # torch's context keeps its own where the capture fails
        return
    graph = Graph()

    def write_down(launches, kernel, variant, grid, *args, **constants):
        def launch():
            with _disable_current_modes():
                original(launches, kernel, variant, grid, *args, **constants)

        graph.calls.append(launch)

    kinds = {type(executor.launch) for executor in executors}
    (kind,) = kinds
    original = kind.__call__
    with pytest.MonkeyPatch.context() as patch, Recorder(graph.calls):
        patch.setattr(kind, "__call__", write_down)
        patch.setattr(upload, "capturing", lambda device: True)
        yield graph
