"""Global and shared memory, and who touched which byte when: what compute-sanitizer would say of it."""

from __future__ import annotations

import contextlib
import gc

import numpy as np
import torch

from .operations import UNSIGNED

NOBODY, SEVERAL = -1, -2
BASE = 64
"""An address below all tensors."""

Event = tuple[int, int]
"""An epoch of a program, and one of its threads."""


class Fault(AssertionError):
    """A kernel did what it must not."""


class View:
    """What one program knows of the order of events.

    Its own threads are in order where a barrier lies between them: an epoch ends there. Programs are in order by what
    one publishes with a release and another takes up with an acquire; the other's threads beside the acquiring one know
    of it behind their next barrier.
    """

    def __init__(self, program: int, threads: int):
        self.program, self.threads = program, threads
        self.epoch = 1
        self.others: dict[int, Event] = {}
        """By program, what it comes after: all earlier epochs, and in this one what that thread did."""
        self.acquired: list[tuple[int, dict[int, Event]]] = []
        """What single threads have learnt since the latest barrier."""

    def barrier(self) -> None:
        self.epoch += 1
        for _, news in self.acquired:
            merge(self.others, news)
        self.acquired = []

    def published(self, thread: int) -> dict[int, Event]:
        found = {self.program: (self.epoch, thread)}
        for news in (self.others, *(news for acquirer, news in self.acquired if acquirer == thread)):
            merge(found, news)
        return found

    def comes_after(self, program: np.ndarray, epoch: np.ndarray, who: np.ndarray, thread: np.ndarray) -> np.ndarray:
        """Whether what happened in epochs of programs, by ``who``, lies behind each thread now."""
        found = (program == self.program) & (epoch < self.epoch)
        for acquirer, news in [(None, self.others), *self.acquired]:
            for other, (end, publisher) in news.items():
                known = (program == other) & ((epoch < end) | ((epoch == end) & (who == publisher)))
                found |= known & (True if acquirer is None else thread == acquirer)
        return found


def merge(known: dict[int, Event], news: dict[int, Event]) -> None:
    for program, event in news.items():
        known[program] = max(known.get(program, event), event)


class Books:
    """The latest accesses to each byte: who wrote it and, by program, who read it, in which epoch."""

    def __init__(self, size: int):
        self.size = size
        self.written = self._empty()
        self.read: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def _empty(self) -> tuple[np.ndarray, np.ndarray]:
        return np.full(self.size, NOBODY), np.zeros(self.size, dtype=np.int64)

    def races(self, at: np.ndarray, thread: np.ndarray, view: View, writes: bool) -> bool:
        """Enter what one instruction reads or writes, byte by byte. Whether one is in no order with an earlier one.

        Where several threads do the same to one byte, the first counts. The compiler makes such copies where there are
        more threads than numbers, and lets the first alone go on with what it has read.
        """
        at, first = np.unique(at, return_index=True)
        thread = thread[first]
        who, epoch = (x[at] for x in self.written)
        found = self._unordered(who, epoch, who // view.threads, thread, view)
        if writes:
            for program, readers in self.read.items():
                who, epoch = (x[at] for x in readers)
                found |= self._unordered(who, epoch, np.full_like(who, program), thread, view)
            self.written[0][at], self.written[1][at] = thread, view.epoch
            return bool(found.any())
        readers, epochs = self.read.setdefault(view.program, self._empty())
        beside = (epochs[at] == view.epoch) & (readers[at] != thread)
        readers[at], epochs[at] = np.where(beside, SEVERAL, thread), view.epoch
        return bool(found.any())

    @staticmethod
    def _unordered(
        who: np.ndarray, epoch: np.ndarray, program: np.ndarray, thread: np.ndarray, view: View
    ) -> np.ndarray:
        return (who != NOBODY) & (who != thread) & ~view.comes_after(program, epoch, who, thread)


class Memory:
    """Accesses by threads, at addresses."""

    books: Books

    def array(self, bits: int) -> np.ndarray:
        raise NotImplementedError

    def places(self, addresses: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
        """Indices into ``array``, and into the books. Fault where nothing is."""
        raise NotImplementedError

    def load(self, addresses: np.ndarray, bits: int, thread: np.ndarray, view: View | None) -> np.ndarray:
        """``view``: None for atomic accesses, which are in order by themselves."""
        at, first = self._find(addresses, bits // 8)
        self._enter(first, bits // 8, thread, view, writes=False)
        return self.array(bits)[at]

    def store(
        self, addresses: np.ndarray, bits: int, thread: np.ndarray, view: View | None, values: np.ndarray
    ) -> None:
        at, first = self._find(addresses, bits // 8)
        array, values = self.array(bits), values.astype(UNSIGNED[bits])
        # Writing what is there already disturbs nobody.
        news = array[at] != values
        self._enter(first[news], bits // 8, thread[news], view, writes=True)
        array[at] = values
        if (array[at] != values).any():
            raise Fault("threads write different numbers to one place at once")

    def _find(self, addresses: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
        addresses = addresses.astype(np.int64)
        if (addresses % size).any():
            raise Fault(f"{size} bytes at an address that is no multiple of it")
        return self.places(addresses, size)

    def _enter(self, first: np.ndarray, size: int, thread: np.ndarray, view: View | None, writes: bool) -> None:
        if view is None:
            return
        byte = (first[:, None] + np.arange(size)).ravel()
        if self.books.races(byte, np.repeat(thread, size), view, writes):
            raise Fault(f"a race: program {view.program} {'writes' if writes else 'reads'} {size} bytes")


class Shared(Memory):
    """What one program's threads share."""

    def __init__(self, size: int):
        self.size = size
        self.bytes = np.zeros(-(-size // 16) * 16, dtype=np.uint8)
        self.books = Books(size)

    def array(self, bits: int) -> np.ndarray:
        return self.bytes.view(UNSIGNED[bits])

    def places(self, addresses: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
        if (addresses < 0).any() or (addresses + size > self.size).any():
            raise Fault(f"shared memory has {self.size} bytes; an access at {addresses.max()}")
        return addresses // size, addresses


class _AllMemory:
    """All of the process's memory, as numbers."""

    def __init__(self, kind: type):
        shape, text = ((2**47 - BASE) // np.dtype(kind).itemsize,), np.dtype(kind).str
        self.__array_interface__ = {"data": (BASE, False), "shape": shape, "typestr": text, "version": 3}


ALL_MEMORY = {bits: np.asarray(_AllMemory(UNSIGNED[bits])) for bits in (8, 16, 32, 64)}


class Global(Memory):
    """The memory of all tensors that there are."""

    device_type = "cpu"

    def __init__(self) -> None:
        storages = []
        for x in gc.get_objects():
            if type(x) in (torch.Tensor, torch.nn.Parameter) and x.device.type == self.device_type:
                with contextlib.suppress(NotImplementedError):  # sparse ones and their like have none
                    storages.append(x.untyped_storage())
        pieces = sorted({(s.data_ptr(), s.data_ptr() + s.nbytes()) for s in storages if s.nbytes()})
        joined: list[list[int]] = []
        for start, end in pieces:
            if joined and start < joined[-1][1]:  # a view with storage of its own
                joined[-1][1] = max(end, joined[-1][1])
            else:
                joined.append([start, end])
        self.starts, self.ends = (np.array(x, dtype=np.int64) for x in zip(*joined))
        self.firsts = np.cumsum(self.ends - self.starts) - (self.ends - self.starts)
        self.books = Books(int((self.ends - self.starts).sum()))
        self.published: dict[int, dict[int, Event]] = {}
        """By address, what was released there."""

    def array(self, bits: int) -> np.ndarray:
        return ALL_MEMORY[bits]

    def places(self, addresses: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
        of = np.searchsorted(self.starts, addresses, side="right") - 1
        if (of < 0).any() or (addresses + size > self.ends[of]).any():
            raise Fault(f"{size} bytes at an address where no tensor is")
        return (addresses - BASE) // size, self.firsts[of] + addresses - self.starts[of]
