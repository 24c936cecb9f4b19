"""The kernels of a first step are compiled side by side: all of them, the same ones, and nothing else."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import triton
from compiling import TRITONS, environment_of

PROGRAM = Path(__file__).parent / "ahead.py"

BESIDE_OTHERS = {
    "clipped": 2, "clipped before": 2, "8 bits": 4, "capturable": 4, "scaler": 2, "means": 3, "units": 2, "tracked": 2,
    "one launch": 0,
}  # fmt: skip
ALONE = {"clipped before": 2, "one launch": 1}
"""The kernels of clip_grad_norm_(), and where there is but one."""

NAMES = {"installed": ["means", *(name for name in BESIDE_OTHERS if name != "means")], "old": ["clipped before"]}
"""By Triton: which kernels a step foresees does not depend on it, only whether it compiles them in threads."""


@pytest.fixture(scope="module", params=TRITONS)
def report(request):
    command = [sys.executable, "-W", "error", PROGRAM, *NAMES[request.param]]
    done = subprocess.run(command, env=environment_of(request.param), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout)
    assert (found["triton"] == triton.__version__) == (request.param == "installed")
    return found | {"expected": {name: BESIDE_OTHERS[name] for name in NAMES[request.param]}}


def test_what_is_compiled_side_by_side(report):
    found = report["first steps"]
    failed = {name: len(step["failed"]) for name, step in found.items()}
    assert {name: step["beside others"] + failed[name] for name, step in found.items()} == report["expected"]
    assert {name: step["alone"] - failed[name] for name, step in found.items()} == {n: ALONE.get(n, 0) for n in found}
    for name, step in found.items():
        # Python's own error, in releases such as 3.11.7, where several threads parse (cpython issue 106905).
        assert all("AST constructor recursion depth mismatch" in error for error in step["failed"]), name
        assert len(step["kernels"]) == step["beside others"] + step["alone"], name
        assert step["threads"] == 0, name


def test_the_kernels_are_those_that_are_launched(report):
    name = next(iter(report["expected"]))
    assert report["first steps"][name]["kernels"] == report["one by one"]


def test_a_kernel_that_cannot_be_loaded_is_found_out_before_any_is_launched(report):
    found = report["without"]
    reason = "the kernel step of lion failed (OutOfResources: out of resource: shared memory"
    (said,) = found["said"]
    assert said.startswith(reason) and "torch takes the steps on cpu from now on" in said
    assert f"backend torch ({reason}" in found["layout"] and found["launches"] == 0


def test_a_compiler_that_fails_is_heard_of_and_asked_again(report):
    assert report["failure"] == ["the compiler has failed", 2]
