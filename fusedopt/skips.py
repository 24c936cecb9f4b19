"""Steps that were skipped, of which only the device may know yet."""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from torch import Tensor

from .upload import on


def _is_over(event: torch.cuda.Event | None) -> bool:
    """Whether the device has come as far as this; without an event it has."""
    return event is None or event.query()


class Skips:
    """How many steps were skipped, and how many of those the host has heard of.

    A GPU decides by itself whether to skip a step. The host learns of it later, without waiting, from
    a copy of the device's count; until then it writes hyperparameters for every count that is possible.
    """

    FURTHEST = 32
    """Steps the host may run ahead of its knowledge before it waits for the oldest."""

    def __init__(self) -> None:
        self.count = 0
        self.tensor: Tensor | None = None
        """The device's verdict: see ``clipping.Verdict``."""
        self.known = 0
        self.unheard: deque[tuple[torch.cuda.Event | None, Tensor]] = deque()
        self.free: list[tuple[torch.cuda.Event, Tensor]] = []
        self.unattended = False
        """Whether skipped steps may be in no count of the host's: where a device counts, or replays a graph."""

    def verdict(self, device: torch.device) -> Tensor:
        """The device's verdict, with the count that it carries on from step to step."""
        if self.tensor is None or self.tensor.device != device:
            self.count = int(self.total())  # the model has moved
            self.unheard.clear()
            with torch.inference_mode(False):  # a step outside it writes there too
                self.tensor = torch.zeros(4, dtype=torch.float64, device=device)
            self.known = 0
        return self.tensor

    def listen(self) -> None:
        """Ask for the count as it is after the step just launched."""
        if self.tensor is None:
            return
        if not self.tensor.is_cuda:
            self.unheard.append((None, self.tensor[3:].clone()))
            return
        if not self.free:
            with torch.inference_mode(False):
                copy = torch.empty(1, dtype=torch.float64, device="cpu", pin_memory=True)
            self.free.append((torch.cuda.Event(), copy))
        event, copy = self.free.pop()
        with on(self.tensor.device):
            copy.copy_(self.tensor[3:], non_blocking=True)
            event.record()
        self.unheard.append((event, copy))

    def resolve(self, wait: bool = False) -> int:
        """How many skipped steps the host has newly heard of."""
        heard = self.known
        while self.unheard and (wait or len(self.unheard) > self.FURTHEST or _is_over(self.unheard[0][0])):
            event, copy = self.unheard.popleft()
            if event is not None:
                event.synchronize()
                self.free.append((event, copy))
            heard = int(copy)
        new, self.known = heard - self.known, heard
        return new

    def leave_out(self) -> None:
        """Take all skips until now as known: they were of steps that the host did not count, and must not be taken back
        from its counts. Not while it is still to hear of steps that it did count. Waits for the device."""
        if self.unattended and self.tensor is not None and not self.unheard:
            self.known = int(self.tensor[3])

    def count_in(self, verdict: Any, sign: int = 1) -> None:
        """Count the step that a ``clipping.Verdict`` skips, or with -1 take it back."""
        if verdict.tensor is None:
            self.count += sign * verdict.skip
        else:
            verdict.tensor[3].add_(verdict.tensor[2], alpha=sign)

    @property
    def variants(self) -> int:
        """How many counts are possible now."""
        return len(self.unheard) + 1

    def total(self) -> Tensor:
        if self.tensor is None:
            return torch.tensor(self.count, device="cpu")
        return self.tensor[3].to(torch.int64) + self.count
