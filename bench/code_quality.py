"""What the compiler makes of every kernel, without a GPU: rule x address x dtype for several GPUs, and some rules with
bfloat16 parameters in each form in which they and their states can be stored.

    python bench/code_quality.py [--targets sm_90] [--dtypes float32]    a table, compared with the committed one
    python bench/code_quality.py --check                                 fails where a kernel became worse
    python bench/code_quality.py --save                                  writes bench/code_quality.csv

Floor times are bytes over published bandwidth: no kernel can be faster, and none has been timed here. ``issue`` is the
time that the instructions of the path for whole tiles take if every lane is busy, as a part of that floor: near 1,
arithmetic would matter.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from history import write

os.environ.pop("TRITON_INTERPRET", None)  # it compiles nothing
TESTS = Path(__file__).resolve().parent.parent / "tests"
sys.path.insert(0, str(TESTS))

import absent_gpu  # noqa: E402
import aot  # noqa: E402
import triton  # noqa: E402
from assembly import disassemble, whole_tiles  # noqa: E402
from form_cases import FORMS, RULES  # noqa: E402
from measure import NORM_KERNEL  # noqa: E402
from rule_cases import ADDRESSES, CASES  # noqa: E402
from shapes import MODELS, elements  # noqa: E402
from triton.runtime import driver  # noqa: E402

from fusedopt import backends  # noqa: E402

REPORT = Path(__file__).with_name("code_quality.csv")
TARGETS = {name: absent_gpu.TARGETS[name] for name in ("sm_80", "sm_90", "sm_100", "gfx942")}
STORED = "float32", "bfloat16", "mixed", *FORMS
MANY = 20
"""Changes to name; more come with another Triton, or when the report is first written."""

ELEMENTS = elements(MODELS["gpt2"])


class GPU(NamedTuple):
    """Published figures: bytes per second, and lanes that issue one float32 instruction per cycle."""

    target: str
    bandwidth: float
    lanes: int
    hertz: float


GPUS = {
    # NVIDIA's data sheets of A100 80GB SXM, H100 SXM, H200 SXM; AMD's of the MI300X. Boost clocks.
    "a100": GPU("sm_80", 2.039e12, 108 * 64, 1.410e9),
    "h100": GPU("sm_90", 3.35e12, 132 * 128, 1.980e9),
    "h200": GPU("sm_90", 4.8e12, 132 * 128, 1.980e9),
    "mi300x": GPU("gfx942", 5.3e12, 304 * 64, 2.100e9),
}


@dataclasses.dataclass
class Kernel:
    """One line of the report."""

    triton: str
    target: str
    kernel: str
    address: str
    dtype: str
    registers: int
    stack: int
    """Bytes per thread, which is where spilled registers go."""
    shared: int
    load_bits: int
    store_bits: int
    instructions: float
    """Per element, on the path for whole tiles; what an update does once per program is included."""
    bytes: float
    """Per element."""
    a100_us: float | None = None
    h100_us: float | None = None
    h200_us: float | None = None
    mi300x_us: float | None = None
    issue: float | None = None
    """Of the fastest of this target's GPUs."""

    def key(self) -> tuple[str, ...]:
        return self.triton, self.target, self.kernel, self.address, self.dtype


WORSE = {"registers": 4, "stack": 0, "shared": 0, "instructions": 1.0, "bytes": 0}
"""By how much a number may grow before it is called worse."""


def report(targets: list[str], dtypes: list[str], cases: list[str], addresses: list[str]) -> Iterator[Kernel]:
    """Every kernel that one clipped step of these cases launches."""
    # CPU tensors are taken for those of the GPU.
    backends._device_problem = lambda device, requested: None
    for target in targets:
        for dtype in dtypes:
            gpu = absent_gpu.NoGPU(target, f"{dtype} report")
            driver.set_active(gpu)
            seen: set[str] = set()
            for address in addresses:
                for case in cases:
                    if dtype in FORMS and (dtype not in RULES.get(case, ()) or address != ADDRESSES[0]):
                        continue
                    before = set(gpu.compiled())
                    step = aot.step_stored if dtype in FORMS else aot.step_once
                    made = step(case, address, dtype, max_grad_norm=1.0)
                    moved = bytes_per_element(made)
                    for kernel in sorted(set(gpu.compiled()) - before, key=lambda kernel: kernel.metadata.name):
                        line = describe(kernel, target, address, dtype, moved)
                        # The norm kernel is compiled for every length of the table's records, and is the same code.
                        if f"{line.kernel} {line.address}" not in seen:
                            seen.add(f"{line.kernel} {line.address}")
                            yield line


def bytes_per_element(optimizer: Any) -> dict[str, float]:
    """Of the norm, which reads gradients, and of the update, which reads them, and reads and writes all else."""
    (bucket,) = optimizer._engine.plan.buckets
    kept = sum(part.dtype.itemsize / part.per for _, form in bucket.stored.roles for part in form.parts)
    return {"norm": bucket.grad_dtype.itemsize, "step": bucket.grad_dtype.itemsize + 2 * kept}


def describe(kernel: Any, target: str, address: str, dtype: str, bytes_moved: dict[str, float]) -> Kernel:
    facts = absent_gpu.facts(kernel)
    name = kernel.metadata.name
    updates = name.startswith("step_")
    way = whole_tiles(disassemble(kernel), updates)
    per_thread = absent_gpu.per_thread(kernel)
    if updates:
        moved = bytes_moved["step"]
    elif name == NORM_KERNEL:
        moved = bytes_moved["norm"]
    else:
        moved = round(way.loads * way.load_bits / 8 / per_thread)  # means: they write a number per tensor
    made = Kernel(
        triton.__version__, target, name, address if updates else "", dtype, facts["registers"], facts["stack"],
        facts["shared"], way.load_bits, way.store_bits,
        round((way.instructions + way.before / absent_gpu.tiles_at_once(kernel)) / per_thread, 1), round(moved, 2),
    )  # fmt: skip
    for label, gpu in GPUS.items():
        if gpu.target == target:
            floor = moved / gpu.bandwidth
            setattr(made, f"{label}_us", round(floor * ELEMENTS * 1e6, 1))
            made.issue = max(made.issue or 0.0, round(made.instructions / (gpu.lanes * gpu.hertz) / floor, 2))
    return made


HEADER = (
    f"{'target':7} {'kernel':31} {'address':10} {'dtype':21} regs stack  smem  ld  st  inst/el   B/el  issue  "
    "floor us for GPT-2 124M"
)


def line(kernel: Kernel) -> str:
    floors = {label: getattr(kernel, f"{label}_us") for label in GPUS}
    return (
        f"{kernel.target:7} {kernel.kernel:31} {kernel.address:10} {kernel.dtype:21} {kernel.registers:4} "
        f"{kernel.stack:5} {kernel.shared:5} {kernel.load_bits:3} {kernel.store_bits:3} {kernel.instructions:8} "
        f"{kernel.bytes:6.2f} {'' if kernel.issue is None else kernel.issue:>6}  "
        f"{', '.join(f'{label} {floor}' for label, floor in floors.items() if floor is not None)}"
    )


def compare(new: list[Kernel], old: list[Kernel]) -> tuple[list[str], list[str]]:
    """(what became worse, what else changed), one sentence each. Kernels of another Triton are another thing."""
    before = {kernel.key(): kernel for kernel in old}
    worse, other = [], []
    for kernel in new:
        label = " ".join(filter(None, kernel.key()[1:]))
        known = before.get(kernel.key())
        if known is None:
            other.append(f"{label}: not in the committed report")
            continue
        for name, slack in WORSE.items():
            a, b = getattr(known, name), getattr(kernel, name)
            if a != b:
                (worse if b > a + slack else other).append(f"{label}: {name} {a} -> {b}")
        for name in ("load_bits", "store_bits"):
            a, b = getattr(known, name), getattr(kernel, name)
            if a != b:
                (worse if b < a else other).append(f"{label}: {name} {a} -> {b}")
    return worse, other


def read(path: Path = REPORT) -> list[Kernel]:
    if not path.exists():
        return []
    kinds = {field.name: field.type for field in dataclasses.fields(Kernel)}
    with path.open(newline="") as file:
        lines = list(csv.DictReader(file))
    return [Kernel(**{name: _value(kinds[name], text) for name, text in line.items()}) for line in lines]


def _value(kind: str, text: str) -> Any:
    return text if kind == "str" else None if text == "" else int(text) if kind == "int" else float(text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--dtypes", nargs="+", choices=STORED, default=list(STORED), metavar="DTYPE")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--addresses", nargs="+", choices=ADDRESSES, default=list(ADDRESSES))
    parser.add_argument("--check", action="store_true", help="exit code 1 if a kernel became worse")
    parser.add_argument("--save", action="store_true", help="replace the lines of these kernels in the report")
    parser.add_argument("--report", type=Path, default=REPORT, help="default: bench/code_quality.csv")
    options = parser.parse_args()
    print(HEADER)
    made = []
    for kernel in report(options.targets, options.dtypes, options.cases, options.addresses):
        made.append(kernel)
        print(line(kernel), flush=True)
    old = read(options.report)
    worse, other = compare(made, old)
    print(*(f"changed: {line}" for line in other[:MANY]), *(f"WORSE: {line}" for line in worse), sep="\n")
    if other[MANY:]:
        print(f"and {len(other) - MANY} other changes, none of them for the worse")
    if options.save:
        replaced = {kernel.key()[1:] for kernel in made}
        write([*(kernel for kernel in old if kernel.key()[1:] not in replaced), *made], Kernel, options.report)
    return int(options.check and bool(worse))


if __name__ == "__main__":
    sys.exit(main())
