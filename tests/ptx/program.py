"""The text of a kernel as a list of instructions."""

from __future__ import annotations

import re
from typing import NamedTuple


class Instruction(NamedTuple):
    text: str
    opcode: str
    """The first part of the name."""
    modifiers: tuple[str, ...]
    """The parts behind it."""
    operands: tuple[str, ...]
    """Registers, numbers, labels; "[register+4]" for addresses, "{a, b}" for vectors."""
    guard: str | None
    """The predicate register without which a thread passes over it."""
    negated: bool
    """Whether threads whose predicate is true do so."""
    types: tuple[str, ...]
    """Those of its modifiers that are types."""

    @property
    def type(self) -> str:
        """Of what is computed, compared or stored."""
        return self.types[-1]


TYPE = re.compile(r"pred|[busf]\d+|bf16|(bf|f|s|u)\d+x2")


class Program(NamedTuple):
    params: list[tuple[str, str]]
    """Name and type."""
    threads: int
    registers: dict[str, str]
    """How many bits the registers of each prefix have, "pred" for truth values."""
    instructions: list[Instruction]
    labels: dict[str, int]
    """The instruction behind each."""


def parse(text: str) -> Program:
    text = re.sub(r"//[^\n]*", "", text)
    head, body = re.search(r"\.entry\s+\w+\((.*?)\)(.*)", text, re.DOTALL).groups()
    params = [(name, kind) for kind, name in re.findall(r"\.param\s+\.(\w+)[^,]*?(\w+)(?=,|\s*$)", head)]
    threads = int(re.search(r"\.reqntid\s+(\d+)", body)[1])
    body = body[body.index("{") + 1 : body.index("\n}")]
    registers = {prefix: kind.lstrip("bfsu") for kind, prefix in re.findall(r"\.reg\s+\.(\w+)\s+(%\w+?)<", body)}
    instructions, labels = [], {}
    body = re.sub(r"^\s*\.(loc|reg|pragma|file|section)[^\n]*", "", body, flags=re.MULTILINE)
    # Half of a number is taken, in a block with a name for the other half.
    body = re.sub(r"\{ \.reg \.b32 tmp; (mov\.b64 \{.*?)\btmp\b(.*?;) \}", r"\1_\2", body)
    for piece in re.findall(r"\$\w+:|[^;:]+;", body.replace("L2::", "L2_").replace("L1::", "L1_").replace("::cta", "")):
        piece = " ".join(piece.split())
        if piece.endswith(":"):
            labels[piece[:-1]] = len(instructions)
        else:
            instructions.append(_instruction(piece[:-1]))
    return Program(params, threads, registers, instructions, labels)


def _instruction(text: str) -> Instruction:
    sign, guard, name, rest = re.fullmatch(r"(?:@(!?)(%\w+) )?([\w.]+)(.*)", text).groups()
    opcode, *modifiers = name.split(".")
    operands = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+", rest)
    types = tuple(filter(TYPE.fullmatch, modifiers))
    return Instruction(text, opcode, tuple(modifiers), tuple(operands), guard, sign == "!", types)
