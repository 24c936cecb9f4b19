"""torch's operations on CUDA tensors, by the CPU's kernels on the same memory; graphs of them."""

from __future__ import annotations

import ctypes
import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch import library as registration
from torch.utils import _pytree as pytree

runtime = ctypes.CDLL(None)

ABOUT_MEMORY = {
    "empty.memory_format", "empty_strided", "resize_", "set_", "set_.source_Storage", "set_.source_Tensor",
    "set_.source_Storage_storage_offset", "as_strided", "view", "_reshape_alias", "alias", "unfold",
    "view_as_real", "view_as_complex", "record_stream", "_pin_memory", "is_pinned", "is_set_to", "_efficientzerotensor",
    "lift",
}  # fmt: skip
"""What launches nothing, and is torch's own."""

WITHOUT_KERNELS = {"copy_", "masked_fill_.Scalar", "masked_fill_.Tensor"}
"""What has no kernel of a device's own, and launches some all the same."""

ASKING = {"_local_scalar_dense", "equal", "is_nonzero", "masked_select", "nonzero", "repeat_interleave", "unique_dim"}
"""What gives a number, or a size that depends on numbers, to the host."""

ERROR = 2
"""Of ``torch.cuda.set_sync_debug_mode``."""

kernels = registration.Library("aten", "IMPL")
"""Of CUDA tensors. They last as long as it does."""

calls: dict[int, list[Callable[[], Any]]] = {}
"""By graph, what its replay does."""

current: list[list[Callable[[], Any]]] = []
"""The calls of the graph that is being captured, if one is."""


def on_host(x: Tensor) -> Tensor:
    """A CPU tensor in the same memory."""
    storage = x.untyped_storage()
    if storage.nbytes() == 0:
        return torch.empty_strided(x.size(), x.stride(), dtype=x.dtype)
    memory = (ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())
    same = torch.frombuffer(memory, dtype=torch.uint8).untyped_storage()
    return torch.empty(0, dtype=x.dtype).set_(same, x.storage_offset(), x.size(), x.stride())


class Call:
    """One operation: its tensors on the GPU, and the same on the host."""

    def __init__(self, op: Any, args: tuple, kwargs: dict[str, Any]):
        self.op, self.pairs = op, []
        self.device = torch.device("cuda", torch.cuda.current_device())
        args, self.kwargs = pytree.tree_map(self._moved, (args, kwargs))
        like = next((x for x in args if isinstance(x, Tensor)), None)
        kinds = [str(argument.type) for argument in op._schema.arguments]
        # torch hands a number over as the number that it was, where the operation takes tensors.
        self.args = [_tensor(x, like) if kind == "Tensor" else x for x, kind in zip(args, kinds)]

    def _moved(self, x: Any) -> Any:
        if isinstance(x, Tensor) and x.is_cuda:
            self.device = x.device
            self.pairs.append((on_host(x), x))
            return self.pairs[-1][0]
        if isinstance(x, torch.device) and x.type == "cuda":
            self.device = x
            return torch.device("cpu")
        return _generator(x) if isinstance(x, torch.Generator) else x

    def __call__(self) -> Any:
        captured = bool(current)
        if captured and self._waits():
            ctypes.c_int.in_dll(runtime, "spoilt").value = 1
            raise RuntimeError(f"operation not permitted when stream is capturing: {self.op}")
        if torch.cuda.get_sync_debug_mode() == ERROR and self._waits():
            raise RuntimeError(f"called a synchronizing CUDA operation: {self.op}")
        before = [(h, h.clone()) for h, _ in self.pairs if 0 not in h.stride()] if captured else []
        result = self.op(*self.args, **self.kwargs)
        for h, x in self.pairs:
            if h.size() != x.size():  # an output that found its size
                x.resize_(h.size()).as_strided_(h.size(), h.stride())
                on_host(x).copy_(h)
        new: list[Tensor] = []
        found = pytree.tree_map(lambda r: self._back(r, new), result)
        if captured:
            for h, values in before:
                if h.size() == values.size():
                    h.copy_(values)
            current[-1].append(lambda: self._again(new))
        return found

    def _waits(self) -> bool:
        """Whether it asks for numbers, or copies from or to the host otherwise than by the way from pinned memory."""
        if self.op is not torch.ops.aten.copy_.default:
            return self.op._schema.name.removeprefix("aten::") in ASKING
        on_gpu = {id(h) for h, _ in self.pairs}
        hosts = [x for x in self.args[:2] if id(x) not in on_gpu]
        non_blocking = self.kwargs.get("non_blocking", self.args[2:] == [True])
        return bool(hosts) and not (non_blocking and all(x.is_pinned() for x in hosts))

    def _again(self, outputs: list[Tensor]) -> None:
        results = pytree.tree_leaves(self.op(*self.args, **self.kwargs))
        fresh = [r for r in results if isinstance(r, Tensor) and self._input_of(r) is None]
        for r, output in zip(fresh, outputs, strict=True):
            on_host(output).copy_(r)

    def _input_of(self, r: Tensor) -> Tensor | None:
        """The tensor on the GPU in whose memory a result lies."""
        for h, x in self.pairs:
            if r is h or (r.numel() and r.untyped_storage().data_ptr() == h.untyped_storage().data_ptr()):
                return x
        return None

    def _back(self, r: Any, new: list[Tensor]) -> Any:
        if not isinstance(r, Tensor):
            return r
        if r.is_sparse:
            parts = (self._back(part, new) for part in (r._indices(), r._values()))
            return torch.sparse_coo_tensor(*parts, r.size(), check_invariants=False)
        for h, x in self.pairs:
            if r is h:
                return x
        of = self._input_of(r)
        if of is not None:
            return of.as_strided(r.size(), r.stride(), r.storage_offset())
        new.append(torch.empty_strided(r.size(), r.stride(), dtype=r.dtype, device=self.device))
        on_host(new[-1]).copy_(r)
        return new[-1]


def _generator(of_gpu: torch.Generator) -> torch.Generator:
    """The host's, for one call: other numbers than a GPU's, and as often the same."""
    offset = of_gpu.get_offset()
    of_gpu.set_offset(offset + 4)  # philox makes four at a time
    return torch.Generator().manual_seed(of_gpu.initial_seed() + offset)


def _tensor(x: Any, like: Tensor | None) -> Any:
    if not isinstance(x, (int, float)):
        return x
    floating = not isinstance(x, bool) and like is not None and like.is_floating_point()
    return torch.tensor(x, dtype=like.dtype if floating else None)


def run(op: Any, *args: Any, **kwargs: Any) -> Any:
    return Call(op, args, kwargs)()


@ctypes.CFUNCTYPE(None, ctypes.c_void_p)
def on_capture(graph: int | None) -> None:
    current[:] = [] if graph is None else [calls.setdefault(graph, [])]


@ctypes.CFUNCTYPE(None, ctypes.c_void_p)
def on_replay(graph: int) -> None:
    for call in calls[graph]:
        call()


def install() -> None:
    torch.cuda.init()
    torch.backends.cudnn.enabled = False
    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    for name, callback in (("on_capture", on_capture), ("on_replay", on_replay)):
        where = ctypes.c_void_p.in_dll(runtime, name)
        where.value = ctypes.cast(callback, ctypes.c_void_p).value
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # every kernel is said to be overridden
        for full_name in torch._C._dispatch_get_all_op_names():
            namespace, _, name = full_name.partition("::")
            has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key(full_name, "CUDA")
            if namespace != "aten" or name in ABOUT_MEMORY or not (has_kernel or name in WITHOUT_KERNELS):
                continue
            base, _, overload = name.partition(".")
            op = getattr(getattr(torch.ops.aten, base), overload or "default", None)
            if op is not None:
                kernels.impl(name, functools.partial(run, op), "CUDA")
