"""A GPU for which Triton cannot compile is found out before a step."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import triton
from compiling import environment_of
from fake_gpu.build import COMPILER, driver

PROGRAM = """
import json, os, sys, torch
from unittest import mock
from launching import StubDriver
from fusedopt import triton_probe

sys.modules["triton.runtime.driver"]._create_driver = StubDriver
found = {}
for name, value in (("CC", "/no/cc"), ("TRITON_CACHE_DIR", __file__)):
    with mock.patch.dict(os.environ, {name: value}):
        found[name] = triton_probe.problem(torch.device("cpu"))
    triton_probe.problem.cache_clear()
print(json.dumps(found))
"""


def test_what_is_missing_is_said(tmp_path):
    """By Triton's own driver, above one that does nothing. That nothing is missing, test_launch.py sees."""
    if COMPILER is None:
        pytest.skip("no C compiler, which Triton needs as well")
    environment = environment_of("installed", [str(Path(__file__).parent)])
    environment |= driver(tmp_path, Path(triton.__file__).parent / "backends" / "nvidia" / "include")
    environment |= {"TRITON_CACHE_DIR": str(tmp_path / "cache")}
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    done = subprocess.run([sys.executable, program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout)
    assert found.keys() == {"CC", "TRITON_CACHE_DIR"}
    for name, words in (("CC", "/no/cc"), ("TRITON_CACHE_DIR", "Not a directory")):
        assert found[name].startswith("Triton cannot compile kernels (") and words in found[name], found
