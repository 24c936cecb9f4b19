"""All tests of the repository on this machine, within a time."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import subprocess
import sys

from gpu_run import ROOT, Run

FIRST = "test_kernels.py", "test_kernel_norm.py", "test_kernel_memory.py", "test_optimizers.py"
LAST = "test_compile.py", "test_demo.py"
"""The same on every machine."""

NOT_HERE = "test_bench.py"
"""It runs this program."""


def tests(run: Run) -> None:
    files = sorted((ROOT / "tests").glob("test_*.py"), key=lambda path: _rank(path.name))
    # A dry run must not test everything again, only see that pytest can be started here.
    chosen = [ROOT / "tests" / "test_imports.py"] if run.dry else [path for path in files if path.name != NOT_HERE]
    command = [sys.executable, "-m", "pytest", "-v", "--tb=short", "-p", "no:cacheprovider", *map(str, chosen)]
    if run.dry:
        command += ["-k", "bench"]
    if not run.dry and importlib.util.find_spec("xdist"):
        command += ["-n", "8"]
    if not run.dry and importlib.util.find_spec("pytest_timeout"):
        command += ["--timeout", "60"]
    log = run.out / "tests.txt"
    with log.open("w") as file:
        # A session of its own, so that the workers of a run that hangs can be ended with it.
        process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=file, start_new_session=True)
        try:
            code = process.wait(run.limit - 10)
            ended = f"exit code {code}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            code, ended = 1, f"cut off after {run.limit - 10:.0f} s"
    lines = [f" {line} " for line in log.read_text().splitlines() if "%]" in line and "::" in line]
    counts = {word: sum(f" {word} " in line for line in lines) for word in ("PASSED", "FAILED", "ERROR", "SKIPPED")}
    failed = [re.search(r"\S+::\S+", line)[0] for line in lines if " FAILED " in line or " ERROR " in line]
    note = f"{', '.join(f'{count} {word.lower()}' for word, count in counts.items())}; {ended}"
    run.result("tests", "pytest", "ok" if code == 0 else "failed", " ".join([note, *failed[:20]]))


def _rank(name: str) -> tuple[int, str]:
    order = {**{name: number - 10 for number, name in enumerate(FIRST)}, **dict.fromkeys(LAST, 1)}
    return order.get(name, 0), name
