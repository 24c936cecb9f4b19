"""Small tables on their way to a device, without anybody waiting."""

from __future__ import annotations

import contextlib
from collections import deque

import numpy as np
import torch
from torch import Tensor

HERE = contextlib.nullcontext()


def on(device: torch.device) -> contextlib.AbstractContextManager:
    """Make ``device`` the current one, if it is a GPU and another one is."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return HERE
    return torch.cuda.device(device)


def capturing(device: torch.device) -> bool:
    """Whether what is launched now goes into a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def free_later(tensor: Tensor) -> None:
    """Before a tensor is dropped: its memory waits for what is queued on this stream, wherever it was allocated."""
    # An alias is none of the allocator's memory, only what it is an alias of.
    if tensor.is_cuda and tensor.untyped_storage().resizable():
        tensor.record_stream(torch.cuda.current_stream(tensor.device))


class Ring:
    """Pinned memory for copies that are under way. A piece is taken again only after its copy has ended; as long as
    the oldest is busy, another one is added."""

    def __init__(self, like: Tensor):
        self.like = like
        self.pieces: deque[tuple[Tensor, np.ndarray, torch.cuda.Event]] = deque()

    def take(self) -> tuple[Tensor, np.ndarray, torch.cuda.Event]:
        """A free piece, its memory as an array, and the event to be recorded behind its copy."""
        if self.pieces and self.pieces[0][2].query():
            piece = self.pieces.popleft()
        else:
            memory = torch.empty(self.like.shape, dtype=self.like.dtype, device="cpu", pin_memory=True)
            piece = memory, memory.numpy(), torch.cuda.Event()
        self.pieces.append(piece)
        return piece


class Upload:
    """A small table on the device. Sending never waits.

    What is sent while a graph is captured belongs to the graph, which will send it again at every replay: a table of
    its own, and memory on the host that nobody else writes to.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.device_copy: Tensor | None = None
        """What was sent last."""
        self.ring: Ring | None = None
        self.made: dict[tuple[int, ...], tuple[Tensor, Ring | None]] = {}
        """Tables, and from where they are sent, by shape: where a GPU skips steps by itself, how many rows there are
        depends on how far the host is ahead of it, and changes at most steps."""
        self.spare: dict[tuple[int, ...], Tensor] = {}
        """Pinned memory for a graph, by shape. Before 2.11 torch can make none during a capture."""
        self.frozen: list[tuple[Tensor, Tensor]] = []
        """What belongs to graphs: each one's table, and its memory on the host."""
        self.is_frozen = False
        self.told: np.ndarray | None = None

    def tell(self, values: np.ndarray) -> None:
        """``send``, unless the device knows them."""
        if not (self.holds() and self.told is not None and np.array_equal(self.told, values)):
            self.told = None  # as long as an interrupt may come before they are on their way
            self.send(values)
            self.told = values

    def holds(self) -> bool:
        """Whether what was sent last may serve one more step: not across the border of a graph."""
        return not self.is_frozen and not capturing(self.device)

    def send(self, values: np.ndarray) -> None:
        if capturing(self.device):
            self._freeze(values)
            return
        if self.device_copy is None or self.device_copy.shape != values.shape or self.is_frozen:
            self._take(values)
        with on(self.device):
            if self.ring is None:
                self.device_copy.copy_(torch.from_numpy(values))
                return
            memory, array, event = self.ring.take()
            array[:] = values
            self.device_copy.copy_(memory, non_blocking=True)
            event.record()

    # Also where a step is taken in inference mode: what was made in it could not be written to outside.
    @torch.inference_mode(False)
    def _freeze(self, values: np.ndarray) -> None:
        memory = torch.from_numpy(values.copy())
        if self.device.type == "cuda":
            memory = self._pinned(memory)
        with on(self.device):
            self.device_copy = torch.empty_like(memory, device=self.device)
            self.device_copy.copy_(memory, non_blocking=True)
        self.frozen.append((self.device_copy, memory))
        self.is_frozen = True

    @torch.inference_mode(False)
    def prepare(self, values: np.ndarray) -> None:
        """Make the pinned memory from which a graph may send values like these, even if nothing was sent before."""
        if self.device.type == "cuda" and values.shape not in self.spare:
            self.spare[values.shape] = torch.empty_like(torch.from_numpy(values), pin_memory=True)

    def _pinned(self, values: Tensor) -> Tensor:
        """The values in pinned memory that nobody else has."""
        spare = self.spare.pop(tuple(values.shape), None)
        return values.pin_memory() if spare is None else spare.copy_(values)

    @torch.inference_mode(False)
    def _take(self, values: np.ndarray) -> None:
        """Send to the table that has their shape from now on."""
        if values.shape not in self.made:
            with on(self.device):
                table = torch.empty_like(torch.from_numpy(values), device=self.device)
            self.made[values.shape] = table, Ring(table) if table.is_cuda else None
        self.device_copy, self.ring = self.made[values.shape]
        self.prepare(values)
        self.is_frozen = False
