"""The programs of bench/, for the tests of them: in processes of their own."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BENCH = ROOT / "bench"


def program(*arguments, **environment):
    """A program of bench/ in a process of its own, without the interpreter unless it asks for it, and not as one of
    several that share the tests, where pytest-benchmark would not measure."""
    inherited = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET" and not k.startswith("PYTEST_XDIST")}
    path = os.pathsep.join([str(Path(sys.executable).parent), inherited.get("PATH", "")])
    return subprocess.run(
        list(map(str, arguments)), env=inherited | {"PATH": path, **environment}, capture_output=True, text=True
    )
