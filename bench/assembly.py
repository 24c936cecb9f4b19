"""What a compiled kernel does per element: its instructions on the way that whole tiles take, and its load width."""

from __future__ import annotations

import heapq
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import triton

CALL = 10**6
"""What a call weighs in a search for the shortest way, in instructions: more than any program has."""


class Instruction(NamedTuple):
    place: str
    """Its address, or the label in front of it."""
    text: str

    @property
    def target(self) -> str | None:
        """Where a branch goes. One that is taken if no lane has anything to do is none: whole tiles keep all busy."""
        if "s_cbranch_execz" in self.text:
            return None
        found = re.search(r"\bBRA\S*\s.*?(0x[0-9a-f]+)|\bs_c?branch\S*\s+(\S+)", self.text)
        return next(filter(None, found.groups())) if found else None

    @property
    def leaves(self) -> bool:
        """Whether something else than the next instruction may follow."""
        return bool(self.target or re.search(r"\b(EXIT|RET\S*|s_endpgm|s_setpc\S*)", self.text))

    @property
    def always_leaves(self) -> bool:
        """NVIDIA's conditions stand in front of the name (``@P0 BRA``) or among the operands (``BRA.U UP0, ...``)."""
        return self.leaves and not re.match(r"@|s_cbranch|BRA\S*\s+!?U?P\d", self.text)

    @property
    def stores_elements(self) -> bool:
        """Whether every thread with elements comes here: NVIDIA's stores of vectors evict first, others do not."""
        return bool(re.search(r"\bSTG\.\S*EF\S*\.(64|128)\b", self.text)) or (
            "global_store_dwordx" in self.text or "buffer_store_dwordx" in self.text
        )

    def width(self, what: str) -> int:
        """Bits per thread, if this loads from or stores to global memory."""
        nvidia, amd = {"load": ("LDG", "load"), "store": ("STG", "store")}[what]
        if found := re.search(rf"\b{nvidia}\.(\S+)", self.text):
            return next((width for width in (256, 128, 64) if str(width) in found[1].split(".")), 32)
        if found := re.search(rf"\b(?:global|buffer)_{amd}_(\w+)", self.text):
            return {"dwordx4": 128, "dwordx3": 96, "dwordx2": 64}.get(found[1], 32)
        return 0


class Way(NamedTuple):
    instructions: int
    """Of one tile."""
    before: int
    """Those in front of a loop over tiles."""
    loads: int
    """How many load with the full width, in all of the program."""
    load_bits: int
    store_bits: int


def disassemble(kernel: Any) -> list[Instruction]:
    if "cubin" not in kernel.asm:
        return _amd(kernel.asm["amdgcn"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        done = subprocess.run([tool, "-sass", file.name], capture_output=True, text=True, check=True)
    lines = re.findall(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?);", done.stdout, re.MULTILINE)
    return [Instruction(hex(int(address, 16)), text) for address, text in lines]


def _amd(text: str) -> list[Instruction]:
    found, label = [], ""
    for line in text.splitlines():
        if named := re.match(r"(\.LBB\w+):", line):
            label = named[1]
        elif re.match(r"\s+[a-z]\w+_\w+", line):
            found.append(Instruction(label, line.split(";")[0].strip()))
            label = ""
        elif re.match(r"\.Lfunc_end", line):
            break
    return found


def whole_tiles(program: list[Instruction], updates: bool = True) -> Way:
    """The way of a thread whose tiles are whole and aligned: the shortest from the start through the first store of
    elements, or wide load if the kernel updates none, to the last wide store or, where that stands in a loop, once
    around the loop. Around blocks that call a subroutine where possible: division and square root do for numbers near
    the ends of the range only."""
    load_bits = max(instruction.width("load") for instruction in program)
    blocks, following = _graph(program)
    lengths = [len(block) + CALL * any("CALL" in program[n].text for n in block) for block in blocks]
    storing = (number for number, block in enumerate(blocks) if any(program[n].stores_elements for n in block))
    widths = [[program[n].width("load") for n in block] for block in blocks]
    # In updates not every wide load is one of elements: AMD's compiler loads a row's numbers so.
    anchor = next(storing if updates else (number for number, found in enumerate(widths) if load_bits in found))
    way = _shortest(lengths, following, anchor, anchor)
    # _shortest leaves out the block that it starts from, and would go around to come back to it.
    there = [0, *_shortest(lengths, following, 0, anchor)] if anchor else [0]
    before = sum(len(blocks[number]) for number in there if number not in way)
    if not way:
        stores = [number for number, block in enumerate(blocks) if any(program[n].width("store") >= 64 for n in block)]
        way = there if stores[-1] == anchor else [*there, *_shortest(lengths, following, anchor, stores[-1])]
        before = 0
    taken = [n for number in way for n in blocks[number]]
    loads = sum(instruction.width("load") == load_bits for instruction in program)
    return Way(len(taken), before, loads, load_bits, max(program[n].width("store") for n in taken))


def _graph(program: list[Instruction]) -> tuple[list[range], list[list[int]]]:
    """Basic blocks, and which may follow each."""
    places = {instruction.place: number for number, instruction in enumerate(program) if instruction.place}
    targets = [places.get(instruction.target) for instruction in program]
    ends = {n + 1 for n, instruction in enumerate(program) if instruction.leaves}
    leaders = sorted({0} | ends - {len(program)} | {target for target in targets if target is not None})
    blocks = [range(start, end) for start, end in zip(leaders, [*leaders[1:], len(program)])]
    number_of = {block.start: number for number, block in enumerate(blocks)}
    following = []
    for number, block in enumerate(blocks):
        last = program[block[-1]]
        after = [number + 1] if number + 1 < len(blocks) and not last.always_leaves else []
        if targets[block[-1]] is not None:
            target = number_of[targets[block[-1]]]
            # Threads without elements, which a whole tile has none of, jump over their stores.
            over = range(number + 1, target) if after else ()
            if not any(program[n].stores_elements for skipped in over for n in blocks[skipped]):
                after.append(target)
        following.append(after)
    return blocks, following


def _shortest(lengths: list[int], following: list[list[int]], start: int, end: int) -> list[int]:
    """The blocks after ``start`` up to ``end``, with the fewest instructions; around a loop if they are the same.
    Empty if there is no way."""
    queue = [(lengths[number], [number]) for number in following[start]]
    heapq.heapify(queue)
    seen: set[int] = set()
    while queue:
        length, way = heapq.heappop(queue)
        if way[-1] == end:
            return way
        if way[-1] not in seen:
            seen.add(way[-1])
            for number in following[way[-1]]:
                heapq.heappush(queue, (length + lengths[number], [*way, number]))
    return []
