"""Tile, warps, grid and mode for each class of GPU: a table, never tried out at run time, since a kernel that updates
its parameters in place cannot be run twice to see which is faster.

A row says where its numbers come from: a row of ``bench/history.csv``, or REASONED.
"""

from typing import NamedTuple

REASONED = "compiled ahead of time and counted, 2026-11-21; not measured on a GPU"


class Tuning(NamedTuple):
    block: int = 1024
    """Elements per tile of the update: a multiple of 256, where tensors in flat buffers start."""
    bytes_at_once: int = 16
    """Bytes of the widest dtype that a thread takes at once."""
    vectors_of_much: int = 2
    """How often a thread does so where states are quantized, which have most to compute per byte, or where something in
    float32 stands beside 16 bits, of which a thread then takes 8 bytes at once: what every thread begins with, reading
    tables and rows, counts half as much per element."""
    norm_bytes: int = 8192
    """Bytes of gradient per tile of the norm: two loads of 16 bytes for each thread, to have enough under way."""
    norm_warps: int = 8
    """Warps per program of the norm; a warp has 32 threads, on AMD 64."""
    registers: dict[int, int] = {2: 80, 4: 64, 8: 96, 16: 176}  # noqa: RUF012, nobody writes to it
    """Per thread of the update, at most, by the elements that it takes, where the compiler can be told. Left to itself
    it may put a number into memory to run more threads than are of use."""
    max_registers: int | None = 80
    """Per thread of the cooperative kernel."""
    max_registers_of_much: int | None = 128
    """The same where states are quantized, which spill at 80."""
    launches: int = 2
    """With clipping, where the user leaves it to us: a norm and an update, or one cooperative launch."""
    programs: int = 4
    """Cooperative programs per multiprocessor, if that many can run there at the same time."""
    origin: str = REASONED


DEFAULT = Tuning()

TABLE = {
    # Half as many threads per multiprocessor as later ones: two programs fit with more registers too.
    "sm_75": Tuning(programs=2, max_registers=96),
    "sm_80": Tuning(),
    "sm_86": Tuning(programs=3),
    "sm_89": Tuning(programs=3),
    "sm_90": Tuning(),
    "sm_100": Tuning(),
    # Wavefronts of 64: as many threads in half as many. How many programs fit is not worked out: one does.
    "gfx942": Tuning(norm_warps=4, programs=1, registers={}, max_registers=None, max_registers_of_much=None),
    # Time there goes by programs.
    "interpreter": Tuning(registers={}, max_registers=None, max_registers_of_much=None),
}


def tuning(backend: str, architecture: int | str) -> Tuning:
    """The row for a Triton target, e.g. ("cuda", 90) or ("hip", "gfx942"); for one that is not listed the row of the
    nearest older one, else the default; of AMD's gfx942's."""
    if backend != "cuda":
        return TABLE.get(str(architecture).split(":")[0], TABLE["gfx942"])
    older = [int(name[3:]) for name in TABLE if name.startswith("sm_") and int(name[3:]) <= architecture]
    return TABLE[f"sm_{max(older)}"] if older else DEFAULT
