"""What the compiler made of the kernels, run thread by thread (ptx/), against the interpreter's run of their source.

On the way the machine looks for races, for accesses outside of tensors and at wrong addresses, and for programs that
wait for ever. FUSEDOPT_EMULATE=all takes every rule and form, which is some minutes; FUSEDOPT_EMULATE_TARGETS names
other GPUs than sm_90, such as "sm_80 sm_100".
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import interpreter_noise
from emulated import outcome, scenarios
from rule_cases import same_bits

EXTENT = os.environ.get("FUSEDOPT_EMULATE", "few")
TARGETS = os.environ.get("FUSEDOPT_EMULATE_TARGETS", "sm_90").split()

IN_ANY_ORDER = "norm of ", 2**-22
"""What sums float32 numbers, for which the interpreter has tiles of another size."""

pytestmark = [
    pytest.mark.usefixtures("needs_triton"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="bench/gpu.sh compares a GPU with the interpreter"),
]


@pytest.fixture(scope="module", params=TARGETS)
def compiled(request, tmp_path_factory):
    """What the compiled kernels leave, by scenario."""
    file = tmp_path_factory.mktemp("emulated") / "found.pt"
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, Path(__file__).with_name("emulated.py"), file, request.param, EXTENT]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return torch.load(file)


@interpreter_noise
@pytest.mark.parametrize("label", scenarios(EXTENT))
def test_compiled_kernels_leave_the_bits_of_the_interpreter(label, compiled, device):
    found, expected = compiled[label], outcome(label, scenarios(EXTENT)[label], device)
    assert found.keys() == expected.keys()
    for key, x in expected.items():
        prefix, tolerance = IN_ANY_ORDER
        if key.startswith(prefix):
            torch.testing.assert_close(found[key], x, rtol=tolerance, atol=0)
        else:
            assert same_bits(found[key], x), key
