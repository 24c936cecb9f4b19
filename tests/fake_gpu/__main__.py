"""Build the libraries, and run a command above them."""

import os
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import torch
import triton
from build import driver, library

HERE = Path(__file__).parent


def main() -> None:
    if (torch.version.cuda or "").split(".")[0] != "13":
        sys.exit(f"torch {torch.__version__} is not built for CUDA 13")
    if torch.cuda.is_available():
        sys.exit("there is a GPU: run the command itself")
    of_triton = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    of_torch = [Path(path) / "cu13" / "include" for path in find_spec("nvidia").submodule_search_locations]
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        runtime = library("runtime.c", folder / "libruntime.so", [*of_torch, of_triton])
        path = [HERE / "startup", HERE.parent, os.environ.get("PYTHONPATH")]
        found = {
            "LD_PRELOAD": str(runtime),
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
            "PYTHONPATH": os.pathsep.join(str(entry) for entry in path if entry),
            "PYTEST_PLUGINS": "fake_gpu.few",
            **driver(folder, of_triton),
        }
        sys.exit(subprocess.run(sys.argv[1:], env=os.environ | found).returncode)


if __name__ == "__main__":
    main()
