"""The libraries, from C."""

import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

COMPILER = shutil.which("cc") or shutil.which("gcc")


def library(source: str, target: Path, include: Iterable[Path]) -> Path:
    """Compile a file of this folder to ``target``."""
    flags = ["-O1", "-w", "-shared", "-fPIC", *(f"-I{path}" for path in include)]
    subprocess.run([COMPILER, *flags, Path(__file__).parent / source, "-o", target, "-ldl"], check=True)
    return target


def driver(folder: Path, include: Path) -> dict[str, str]:
    """Compile the driver, and return the environment in which Triton and torch find it."""
    library("driver.c", folder / "libcuda.so.1", [include])
    (folder / "libcuda.so").symlink_to("libcuda.so.1")
    return {"TRITON_LIBCUDA_PATH": str(folder), "LD_LIBRARY_PATH": str(folder)}
