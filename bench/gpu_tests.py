"""All tests of the repository on this machine, within a time."""

from __future__ import annotations

import functools
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor

from gpu_run import ROOT, Run
from shard import LOST

NOT_HERE = "test_bench.py"
"""It runs this program."""

MOST = 16
"""Processes at a time."""

RESERVE = 15
"""Seconds of the part's time in which to read what they have printed."""


def tests(run: Run) -> None:
    folder = ROOT / "tests"
    ignored = [folder / name for name in ("distributed", "frameworks", NOT_HERE)]
    # A dry run must not test everything again, only see that pytest can be started here.
    chosen = [folder / "test_imports.py"] if run.dry else [folder, *(f"--ignore={path}" for path in ignored)]
    command = [sys.executable, "-m", "pytest", "-v", "--tb=short", "-p", "no:cacheprovider", *map(str, chosen)]
    command += ["--continue-on-collection-errors", "-o", "faulthandler_timeout=60", "-p", "shard"]
    if run.dry:
        command += ["-k", "bench"]
    # Most of a test's time on a GPU is compiling, which one core does.
    count = 1 if run.dry else min(MOST, os.cpu_count() or 1)
    codes, texts = _run([[*command, f"--shard={part}/{count}"] for part in range(count)], run.end - RESERVE)
    text = "\n".join(texts)
    (run.out / "tests.txt").write_text(text)
    lines = [f" {line} " for line in text.splitlines() if "%]" in line and "::" in line]
    counts = {word: sum(f" {word} " in line for line in lines) for word in ("PASSED", "FAILED", "ERROR", "SKIPPED")}
    failed = [re.search(r"\S+::\S+", line)[0] for line in lines if " FAILED " in line or " ERROR " in line]
    failed += sorted(set(re.findall(r"^ERROR (\S+\.py)", text, flags=re.MULTILINE)))
    ended = [f"cut off in {_latest(text)}" if code is None else f"exit code {code}" for code, text in zip(codes, texts)]
    note = f"{', '.join(f'{count} {word.lower()}' for word, count in counts.items())}; {', '.join(sorted(set(ended)))}"
    run.result("tests", "pytest", "ok" if set(codes) == {0} else "failed", " ".join([note, *failed[:20]]))


def _run(commands: list[list[str]], end: float) -> tuple[list[int | None], list[str]]:
    """Run them side by side, until ``end`` at most. Their exit codes, None for those that were cut off, and what they
    have printed."""
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(len(commands)) as pool:
        logs = [pathlib.Path(folder) / str(part) for part in range(len(commands))]
        codes = list(pool.map(functools.partial(_to_the_end, end=end), commands, logs))
        return codes, [log.read_text(errors="replace") for log in logs]


def _to_the_end(command: list[str], log: pathlib.Path, end: float) -> int | None:
    """Run a shard, and where its process has lost the GPU the rest of it in another one."""
    code, lost = _once(command, log, end), False
    while code == LOST:
        lost = True
        behind = re.findall(r"the GPU was lost in this process behind (\d+) tests", log.read_text(errors="replace"))[-1]
        code = _once([*command, f"--behind={behind}"], log, end)
    return LOST if lost and code is not None else code


def _once(command: list[str], log: pathlib.Path, end: float) -> int | None:
    paths = [str(ROOT / "bench"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    with log.open("a") as file:
        # A session of its own, so that what a run that hangs has started can be ended with it.
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=file, stderr=file, start_new_session=True
        )  # fmt: skip
    return _wait(process, end)


def _wait(process: subprocess.Popen, end: float) -> int | None:
    try:
        return process.wait(max(0.0, end - time.monotonic()))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return None


def _latest(text: str) -> str:
    """The test that was running when no more was printed."""
    return (re.findall(r"^\S+\.py::\S+", text, flags=re.MULTILINE) or ["no test yet"])[-1]
