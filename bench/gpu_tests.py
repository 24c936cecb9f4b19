"""All tests of the repository on this machine, within a time."""

from __future__ import annotations

import os
import pathlib
import re
import signal
import subprocess
import sys
import time

from gpu_run import ROOT, Run

NOT_HERE = "test_bench.py"
"""It runs this program."""

MOST = 16
"""Processes at a time."""


def tests(run: Run) -> None:
    folder = ROOT / "tests"
    ignored = [folder / name for name in ("distributed", "frameworks", NOT_HERE)]
    # A dry run must not test everything again, only see that pytest can be started here.
    chosen = [folder / "test_imports.py"] if run.dry else [folder, *(f"--ignore={path}" for path in ignored)]
    command = [sys.executable, "-m", "pytest", "-v", "--tb=short", "-p", "no:cacheprovider", *map(str, chosen)]
    command += ["--continue-on-collection-errors", "-p", "shard"]
    if run.dry:
        command += ["-k", "bench"]
    # Most of a test's time on a GPU is compiling, which one core does.
    count = 2 if run.dry else min(MOST, os.cpu_count() or 1)
    codes = _run([[*command, f"--shard={part}/{count}"] for part in range(count)], run)
    text = "".join(_log(run, part).read_text() for part in range(count))
    lines = [f" {line} " for line in text.splitlines() if "%]" in line and "::" in line]
    counts = {word: sum(f" {word} " in line for line in lines) for word in ("PASSED", "FAILED", "ERROR", "SKIPPED")}
    failed = [re.search(r"\S+::\S+", line)[0] for line in lines if " FAILED " in line or " ERROR " in line]
    failed += sorted(set(re.findall(r"^ERROR (\S+\.py)", text, flags=re.MULTILINE)))
    ended = ", ".join(sorted({"cut off" if code is None else f"exit code {code}" for code in codes}))
    note = f"{', '.join(f'{count} {word.lower()}' for word, count in counts.items())}; {ended}"
    run.result("tests", "pytest", "ok" if set(codes) == {0} else "failed", " ".join([note, *failed[:20]]))


def _run(commands: list[list[str]], run: Run) -> list[int | None]:
    """Run them side by side, as long as there is time. Their exit codes, None for those that were cut off."""
    paths = [str(ROOT / "bench"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    started, end = [], time.monotonic() + run.limit - 10
    for part, command in enumerate(commands):
        with _log(run, part).open("w") as file:
            # A session of its own, so that what a run that hangs has started can be ended with it.
            started.append(
                subprocess.Popen(
                    command, cwd=ROOT, env=environment, stdout=file, stderr=file, start_new_session=True
                )
            )  # fmt: skip
    codes: list[int | None] = []
    for process in started:
        try:
            codes.append(process.wait(max(0.0, end - time.monotonic())))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            codes.append(None)
    return codes


def _log(run: Run, part: int) -> pathlib.Path:
    return run.out / f"tests-{part}.txt"
