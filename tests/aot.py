"""Compile what the optimizers launch, for GPUs that are not there.

A program of its own, since Triton's interpreter and compiler cannot live in one process::

    python tests/aot.py sm_90 gfx942    # facts about every kernel, as JSON
    python tests/aot.py launches        # how often 50 steps compile

Whole optimizer steps run on CPU tensors: planning, tables, Triton's binder and cache, its compiler and
ptxas are the real ones, and only the launch does nothing.
"""

import collections
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from rule_cases import ADDRESSES, CASES, CHAINS, optimizer, parameters, set_gradients
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from fusedopt import backends, kernels

TARGETS = {
    "sm_75": GPUTarget("cuda", 75, 32),
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}

DTYPES = {
    # Of parameter and gradient, and of the states.
    "float32": (torch.float32, torch.float32),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "float64": (torch.float64, torch.float64),
    "mixed": (torch.bfloat16, torch.float32),
}

KERNELS = kernels.step.step, kernels.norm.sum_of_squares, kernels.norm.judge


class NoGPU:
    """A driver whose GPU is ``target``: knows what can be compiled, and launches nothing."""

    target = "sm_90"
    compiled: list[str] = []

    def get_current_target(self):
        return TARGETS[self.target]

    def get_current_device(self):
        # Triton's caches go by device, so each target has its own.
        return self.target

    def get_current_stream(self, device):
        return 0

    def get_active_torch_device(self):
        return torch.device("cpu")

    @staticmethod
    def is_active():
        return True

    class utils:
        @staticmethod
        def get_device_properties(device):
            return {"max_shared_mem": 65536, "multiprocessor_count": 132, "warpSize": 32, "max_num_regs": 65536}

        @staticmethod
        def load_binary(name, binary, shared, device):
            NoGPU.compiled.append(name)
            return None, None, 0, 0, 1024

    class launcher_cls:
        def __init__(self, source, metadata):
            pass

        def __call__(self, *args):
            pass


def compiled_for(target):
    """Every kernel that was compiled for a target so far."""
    return [kernel for fn in KERNELS for kernel in fn.device_caches[target][0].values()]


def run_steps(case, address, dtype, **settings):
    """Two steps of a model with aligned and misaligned tensors, tails and several groups."""
    param, state = DTYPES[dtype]
    sizes = [5000, 33]
    params = parameters(sizes, "cpu", param)
    made = optimizer(case, params, address, **settings)
    if state is not param:
        for p in params:
            keys = made.rule(made.param_groups[0]).states
            made.state[p] = {key: torch.zeros_like(p, dtype=state) for key in keys}
            if keys and made.counts_steps:
                made.state[p]["step"] = torch.tensor(1.0)
    set_gradients(params, [torch.ones_like(p) for p in params])
    made.step()
    return made


def facts(kernel, **labels):
    """What the assembly says."""
    assembly = kernel.asm["ptx"] if "ptx" in kernel.asm else kernel.asm["amdgcn"]
    found = {"name": kernel.metadata.name, "shared": kernel.metadata.shared, **labels}
    # Behind a predicate such as @%p1, and in front of its operands.
    opcodes = re.findall(r"^\s+(?:@!?%\w+\s+)?([a-z][\w.:]*)\b", assembly, re.MULTILINE)
    found["opcodes"] = collections.Counter(opcodes)
    if "ptx" in kernel.asm:
        found |= resources(kernel.asm["cubin"])
    else:
        numbers = {key: int(value) for key, value in re.findall(r"\.(\w+):\s+(\d+)\s*$", assembly, re.MULTILINE)}
        found["registers"] = numbers["vgpr_count"]
        found["stack"] = numbers["private_segment_fixed_size"]
        found["spills"] = numbers["vgpr_spill_count"] + numbers["sgpr_spill_count"]
    return found


def resources(cubin):
    """Registers per thread and bytes of stack (which is where spills go), from ptxas' own books."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
    (usage,) = re.findall(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text.stdout + text.stderr)
    registers, stack, local = map(int, usage)
    return {"registers": registers, "stack": stack, "spills": local}


def kernel_facts(target):
    """Facts about every rule x address x dtype with everything around it, and about the norm kernel."""
    NoGPU.target = target
    everything = CHAINS["all"] | {"skip_nonfinite": True}
    for dtype in DTYPES:
        for address in ADDRESSES:
            for case in CASES:
                before = set(compiled_for(target))
                run_steps(case, address, dtype, **everything)
                for kernel in set(compiled_for(target)) - before:
                    yield facts(kernel, target=target, case=case, address=address, dtype=dtype)


def main(jobs):
    assert os.environ.get("TRITON_INTERPRET") != "1"
    driver.set_active(NoGPU())
    # CPU tensors are taken for a GPU's.
    backends.interpreting = lambda: True
    print(json.dumps([fact for job in jobs for fact in kernel_facts(job)]))


if __name__ == "__main__":
    main(sys.argv[1:])
