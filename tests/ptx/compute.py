"""The registers of one program's threads, and what instructions make of them."""

from __future__ import annotations

import numpy as np

from . import operations as ops
from .program import Instruction, Program

WARP = 32


class Registers:
    """Those of all threads, a number for each of them."""

    def __init__(self, program: Program, number: int, grid: int):
        count = self.count = program.threads
        self.kinds = program.registers
        lane = np.arange(count, dtype=np.uint32)
        self.special = {
            "%tid.x": lane, "%ntid.x": np.full(count, count, np.uint32), "%laneid": lane % WARP,
            "%ctaid.x": np.full(count, number, np.uint32), "%nctaid.x": np.full(count, grid, np.uint32),
        }  # fmt: skip
        self.registers: dict[str, np.ndarray] = {}
        self.immediates: dict[tuple[str, int], np.ndarray] = {}
        self.mask = np.ones(count, dtype=bool)
        """Which threads take part in the current instruction."""

    def get(self, operand: str, bits: int) -> np.ndarray:
        """The bits of an operand."""
        if operand in self.special:
            return self.special[operand].astype(ops.UNSIGNED[bits], copy=False)
        if operand.startswith("%"):
            found = self.registers.get(operand)
            if found is None:
                found = np.zeros(self.count, dtype=ops.UNSIGNED[self._size(operand)])
            return found.astype(ops.UNSIGNED[bits], copy=False)
        if (operand, bits) not in self.immediates:
            self.immediates[operand, bits] = np.full(self.count, _immediate(operand, bits), dtype=ops.UNSIGNED[bits])
        return self.immediates[operand, bits]

    def value(self, operand: str, kind: str) -> np.ndarray:
        return ops.read(self.get(operand, ops.bits_of(kind)), kind)

    def put(self, register: str, bits: np.ndarray, signed: bool = False) -> None:
        """Set a register of the threads that take part. What is smaller than it is extended."""
        if register == "_":
            return
        size = ops.UNSIGNED[self._size(register)]
        if signed:
            bits = bits.view(bits.dtype.str.replace("u", "i")).astype(np.int64)
        before = self.registers.get(register)
        if before is None:
            before = np.zeros(self.count, dtype=size)
        self.registers[register] = np.where(self.mask, bits.astype(size), before)

    def _size(self, register: str) -> int:
        kind = self.kinds[register.rstrip("0123456789")]
        return 1 if kind == "pred" else int(kind)

    def compute(self, one: Instruction) -> None:
        """An instruction that needs nothing but registers."""
        with np.errstate(all="ignore"):
            if one.opcode == "mov":
                self._move(one)
            elif one.opcode == "setp":
                self._compare(one)
            else:
                kind = one.types[0]
                self.put(one.operands[0], self._result(one, kind), signed=one.opcode == "cvt" and kind[0] == "s")

    def _move(self, one: Instruction) -> None:
        target, source = one.operands
        bits = ops.bits_of(one.type)
        pieces = parts(target)
        if len(pieces) > 1:
            whole, size = self.get(source, bits), bits // len(pieces)
            for k, part in enumerate(pieces):
                self.put(part, (whole >> np.array(k * size, dtype=whole.dtype)).astype(ops.UNSIGNED[size]))
        elif source.startswith("{"):
            pieces = parts(source)
            size = bits // len(pieces)
            whole = np.zeros(self.count, dtype=ops.UNSIGNED[bits])
            for k, piece in enumerate(pieces):
                whole |= self.get(piece, size).astype(whole.dtype) << np.array(k * size, dtype=whole.dtype)
            self.put(target, whole)
        else:
            self.put(target, self.get(source, bits))

    def _compare(self, one: Instruction) -> None:
        targets, a, b = one.operands
        how = one.modifiers[0]
        if one.type.endswith("x2"):
            kind = one.type[:-2]
            pairs = zip(targets.split("|"), ops.halves(self.get(a, 32)), ops.halves(self.get(b, 32)))
            for target, x, y in pairs:
                self.put(target, ops.compared(ops.read(x, kind), ops.read(y, kind), how))
        else:
            self.put(targets, ops.compared(self.value(a, one.type), self.value(b, one.type), how))

    def _result(self, one: Instruction, kind: str) -> np.ndarray:
        opcode, modifiers, (_, *sources) = one.opcode, one.modifiers, one.operands
        if kind.endswith("x2") and opcode == "cvt":
            high, low = (ops.write(self.value(x, one.type), kind[:-2]) for x in sources)
            return ops.joined(low, high)
        if kind.endswith("x2"):
            split = zip(*(ops.halves(self.get(x, ops.bits_of(kind))) for x in sources))
            return ops.joined(*(self._arithmetic(one, kind[:-2], [ops.read(x, kind[:-2]) for x in xs]) for xs in split))
        if opcode == "cvt":
            return ops.write(ops.converted(self.value(sources[0], one.type), modifiers, kind), kind)
        if opcode == "selp":
            return np.where(self.get(sources[2], 1), *(self.get(x, ops.bits_of(kind)) for x in sources[:2]))
        if opcode in ("shl", "shr", "bfe"):
            amounts = [self.get(x, 32) for x in sources[1:]]
            value = self.value(sources[0], kind)
            found = ops.field(value, *amounts) if opcode == "bfe" else ops.shifted(value, *amounts, opcode == "shl")
            return ops.write(found, kind)
        if opcode == "prmt":
            return ops.permuted(*(self.get(x, 32) for x in sources))
        if "wide" in modifiers or "hi" in modifiers:
            return self._wide(one, kind, sources)
        if len(one.types) > 1:  # a sum of two types: the first number has the second one
            first = ops.converted(self.value(sources[0], one.type), (), one.types[0])
            return self._arithmetic(one, kind, [first.astype(np.float32), self.value(sources[1], kind)])
        return self._arithmetic(one, kind, [self.value(x, kind) for x in sources])

    def _wide(self, one: Instruction, kind: str, sources: list[str]) -> np.ndarray:
        """Products of twice the size, or their upper half."""
        twice = kind[0] + str(2 * ops.bits_of(kind))
        a, b = (self.value(x, kind).astype(np.int64 if kind[0] == "s" else np.uint64) for x in sources[:2])
        if "hi" in one.modifiers:
            return ops.write(a * b >> np.array(ops.bits_of(kind), dtype=a.dtype), kind)
        added = self.value(sources[2], twice).astype(a.dtype) if one.opcode == "mad" else 0
        return ops.write(a * b + np.array(added, dtype=a.dtype), twice)

    @staticmethod
    def _arithmetic(one: Instruction, kind: str, values: list[np.ndarray]) -> np.ndarray:
        if one.opcode in ("min", "max"):
            found = (ops.smaller if one.opcode == "min" else ops.larger)(*values, "NaN" in one.modifiers)
        elif one.opcode == "fma":
            found = ops.multiplied_and_added(*values)
        elif one.opcode == "mad":
            found = values[0] * values[1] + values[2]
        elif len(values) == 1:
            found = ops.UNARY[one.opcode](values[0])
        else:
            found = ops.BINARY[one.opcode](*values)
        return ops.write(found, kind)


def parts(operand: str) -> list[str]:
    return [part.strip() for part in operand.strip("{}").split(",") if part.strip()]


def _immediate(text: str, bits: int) -> int:
    if text[:2] in ("0f", "0d"):
        return int(text[2:], 16)
    if text == "global_smem":
        return 0
    return int(text.rstrip("U"), 0) & (2**bits - 1)
