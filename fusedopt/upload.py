"""Small tables on their way to a device, without anybody waiting."""

from __future__ import annotations

import contextlib

import numpy as np
import torch
from torch import Tensor


class Upload:
    """A small table on the device. Sending never waits: as long as a copy is under way its pinned
    memory is left alone, and another piece is taken."""

    def __init__(self, device: torch.device):
        self.device = device
        self.device_copy: Tensor | None = None
        self.pinned: list[tuple[Tensor, torch.cuda.Event]] = []

    def send(self, values: np.ndarray) -> None:
        source = torch.from_numpy(values)
        if self.device_copy is None or self.device_copy.shape != source.shape:
            self.device_copy = torch.empty_like(source, device=self.device)
            self.pinned = []
        if not self.device_copy.is_cuda:
            self.device_copy.copy_(source)
            return
        with on(self.device):
            self._send_pinned(source)

    def _send_pinned(self, source: Tensor) -> None:
        free = next((i for i, (_, event) in enumerate(self.pinned) if event.query()), None)
        if free is None:
            self.pinned.append((torch.empty_like(source, pin_memory=True), torch.cuda.Event()))
            free = len(self.pinned) - 1
        staging, event = self.pinned[free]
        staging.copy_(source)
        self.device_copy.copy_(staging, non_blocking=True)
        event.record()


def on(device: torch.device) -> contextlib.AbstractContextManager:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
