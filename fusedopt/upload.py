"""Small tables on their way to a device, and numbers on their way back, without anybody waiting."""

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
    """A small table on the device. Sending never waits."""

    def __init__(self, device: torch.device):
        self.device = device
        self.device_copy: Tensor | None = None
        self.ring: Ring | None = None

    def send(self, values: np.ndarray) -> None:
        if self.device_copy is None or self.device_copy.shape != values.shape:
            self._allocate(values)
        with on(self.device):
            if self.ring is None:
                self.device_copy.copy_(torch.from_numpy(values))
                return
            memory, array, event = self.ring.take()
            array[:] = values
            self.device_copy.copy_(memory, non_blocking=True)
            event.record()

    def _allocate(self, values: np.ndarray) -> None:
        with on(self.device):
            if self.device_copy is not None and self.device_copy.is_cuda:
                # A kernel on this stream may still read it, wherever it was allocated.
                self.device_copy.record_stream(torch.cuda.current_stream())
            self.device_copy = torch.empty_like(torch.from_numpy(values), device=self.device)
        self.ring = Ring(self.device_copy) if self.device_copy.is_cuda else None
