"""Programs of threads, and launches of them."""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from . import operations as ops
from .compute import WARP, Registers, parts
from .memory import Fault, Global, Shared, View, merge
from .program import Instruction, Program

JUMPS = {"bra", "ret", "exit", "bar"}
"""What leads a thread elsewhere than to the next instruction, or lets it wait."""

IGNORED = {"createpolicy", "prefetch", "griddepcontrol", "membar", "fence"}


def launch(program: Program, grid: int, arguments: Sequence[Any], shared_bytes: int, seed: int = 0) -> None:
    """Run ``grid`` programs, which take turns by chance wherever they wait for each other, or tell each other
    something. Fault for what compute-sanitizer would report, and where none of them gets on.

    Args:
        arguments: numbers and addresses, as many as the kernel has parameters.
    """
    memory, chance = Global(), random.Random(seed)
    numbers = {name: _bits(value, kind) for (name, kind), value in zip(program.params, arguments, strict=True)}
    running = [Running(program, number, grid, numbers, memory, shared_bytes).run() for number in range(grid)]
    turns = 0
    while running:
        one = chance.choice(running)
        try:
            next(one)
        except StopIteration:
            running.remove(one)
            turns = 0
        turns += 1
        if turns > 1000 * (grid + 1):
            raise Fault(f"{len(running)} of {grid} programs wait for ever")


def _bits(value: Any, kind: str) -> int:
    if kind[0] == "f":
        code, whole = {"f32": ("<f", "<I"), "f64": ("<d", "<Q")}[kind]
        return struct.unpack(whole, struct.pack(code, value))[0]
    return int(value) & (2 ** ops.bits_of(kind) - 1)


class Running(Registers):
    """One program."""

    def __init__(
        self, program: Program, number: int, grid: int, params: dict[str, int], memory: Global, shared_bytes: int
    ):
        super().__init__(program, number, grid)
        self.program, self.params, self.memory, self.shared = program, params, memory, Shared(shared_bytes)
        self.view = View(number, self.count)
        self.thread = number * self.count + np.arange(self.count)
        self.at = np.zeros(self.count, dtype=np.int64)
        """The instruction that each thread comes to next."""
        self.waits = np.zeros(self.count, dtype=bool)
        """Which threads have reached a barrier."""

    def run(self) -> Iterator[None]:
        """Threads that are behind go first, so that those of one way come together again."""
        instructions, end = self.program.instructions, len(self.program.instructions)
        while (self.at < end).any():
            ready = (self.at < end) & ~self.waits
            if not ready.any():
                self.view.barrier()
                self.waits[:] = False
                continue
            number = int(self.at[ready].min())
            together = ready & (self.at == number)
            ahead = self.at[ready & ~together]
            meeting = int(ahead.min()) if ahead.size else end
            while number < meeting:
                one = instructions[number]
                number += 1
                if one.opcode in JUMPS:
                    break
                yield from self._step(one, together)
            else:
                one = None
            self.at[together] = number
            if one is not None:
                self._jump(one, together)

    def _jump(self, one: Instruction, threads: np.ndarray) -> None:
        chosen = self._guarded(one, threads)
        if one.opcode == "bar":
            self.waits |= chosen
        else:
            ends = one.opcode in ("ret", "exit")
            self.at[chosen] = len(self.program.instructions) if ends else self.program.labels[one.operands[0]]

    def _guarded(self, one: Instruction, threads: np.ndarray) -> np.ndarray:
        return threads if one.guard is None else threads & (self.registers[one.guard] != one.negated)

    def _step(self, one: Instruction, threads: np.ndarray) -> Iterator[None]:
        self.mask = self._guarded(one, threads)
        if one.opcode in IGNORED or (one.guard is not None and not self.mask.any()):
            return
        if one.opcode == "atom" or (one.opcode == "ld" and "acquire" in one.modifiers):
            yield
            self._synchronize(one)
        elif one.opcode in ("ld", "st"):
            self._access(one)
        elif one.opcode in ("shfl", "redux", "stmatrix"):
            getattr(self, f"_{one.opcode}")(one)
        else:
            self.compute(one)

    def _address(self, operand: str) -> np.ndarray:
        base, _, offset = operand.strip("[] ").replace(" ", "").partition("+")
        if base.startswith("%"):
            return self.get(base, 64)[self.mask] + np.uint64(int(offset or 0) & (2**64 - 1))
        return np.full(int(self.mask.sum()), int(offset or 0), dtype=np.uint64)

    def _access(self, one: Instruction) -> None:
        bits, loads = ops.bits_of(one.type), one.opcode == "ld"
        target, address = one.operands[:2] if loads else one.operands[1::-1]
        if "param" in one.modifiers:
            name = address.strip("[]")
            self.put(target, np.full(self.count, self.params[name], dtype=ops.UNSIGNED[bits]))
            return
        memory = self.shared if "shared" in one.modifiers else self.memory
        pieces = parts(target)
        addresses, thread = self._address(address), self.thread[self.mask]
        if (addresses % (len(pieces) * bits // 8)).any():
            raise Fault(f"a vector at an address that is no multiple of its size: {one.text}")
        for k, part in enumerate(pieces):
            at = addresses + np.uint64(k * bits // 8)
            try:
                if loads:
                    found = np.zeros(self.count, dtype=ops.UNSIGNED[bits])
                    found[self.mask] = memory.load(at, bits, thread, self.view)
                    self.put(part, found)
                else:
                    memory.store(at, bits, thread, self.view, self.get(part, bits)[self.mask])
            except Fault as fault:
                raise Fault(f"{fault}: {one.text}") from None

    def _synchronize(self, one: Instruction) -> None:
        """An atomic addition, or a load that acquires, thread by thread."""
        bits = ops.bits_of(one.type)
        found = np.zeros(self.count, dtype=ops.UNSIGNED[bits])
        for lane, address in zip(np.flatnonzero(self.mask), self._address(one.operands[1])):
            at, thread = np.array([address]), self.thread[lane : lane + 1]
            found[lane] = before = self.memory.load(at, bits, thread, None)[0]
            events = self.memory.published.setdefault(int(address), {})
            if {"acquire", "acq_rel"} & set(one.modifiers):
                self.view.acquired.append((int(thread[0]), dict(events)))
            if one.opcode == "atom":
                added = np.array([before]) + self.get(one.operands[2], bits)[lane]
                self.memory.store(at, bits, thread, None, added)
                if {"release", "acq_rel"} & set(one.modifiers):
                    merge(events, self.view.published(int(thread[0])))
        self.put(parts(one.operands[0])[0], found)

    # Between the threads of a warp.

    def _shfl(self, one: Instruction) -> None:
        target, source, by, *_ = one.operands
        lanes, step = np.arange(self.count), self.get(by, 32).astype(np.int64)
        inside = {"bfly": (lanes % WARP) ^ step, "idx": step % WARP, "down": (lanes % WARP) + step}[one.modifiers[1]]
        chosen = lanes - lanes % WARP + np.where(inside < WARP, inside, lanes % WARP)
        self.put(target, self.get(source, 32)[chosen])

    def _redux(self, one: Instruction) -> None:
        values = self.value(one.operands[1], one.type).reshape(-1, WARP)
        best = {"max": np.max, "min": np.min, "add": np.sum}[one.modifiers[1]](values, axis=1)
        self.put(one.operands[0], ops.write(np.repeat(best, WARP).astype(values.dtype), one.type))

    def _stmatrix(self, one: Instruction) -> None:
        """Each thread's registers hold two columns of a row of several 8 x 8 matrices; the threads that store a row's
        begin give its address."""
        address = one.operands[0].strip("[]")
        rows = self.get(address, 32).reshape(-1, WARP)
        lane = np.arange(WARP)
        for k, part in enumerate(parts(one.operands[1])):
            at = rows[:, 8 * k + lane // 4] + 4 * (lane % 4).astype(np.uint32)
            self.shared.store(at.ravel(), 32, self.thread, self.view, self.get(part, 32))
