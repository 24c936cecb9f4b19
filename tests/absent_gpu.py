"""A GPU that is not there, for which Triton compiles, and what can be read of the kernels that it made."""

import collections
import math
import re
import subprocess
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget

from fusedopt import kernels, means

TARGETS = {
    "sm_75": GPUTarget("cuda", 75, 32),
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}

KERNELS = (
    kernels.step.step, kernels.means.means_of_terms, kernels.norm.sum_of_squares, kernels.norm.judge,
    kernels.clipped.clipped_step, kernels.tracked.tracked_step, kernels.units.ratios_of_units,
    kernels.numbers.write_rows, kernels.numbers.advance,
)  # fmt: skip


class NoGPU:
    """A driver whose GPU is ``target``: knows for what to compile, and launches nothing."""

    def __init__(self, target, label):
        self.target = TARGETS[target]
        # Triton's caches go by device: a label gives a test caches of its own.
        self.device = f"{target} {label}"

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return self.device

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
            # Module, function, registers, spills, largest number of threads.
            return None, None, 0, 0, 1024

    class launcher_cls:
        def __init__(self, source, metadata):
            pass

        def __call__(self, *args):
            pass

    def compiled(self):
        """Every kernel that was compiled for this device so far."""
        return [kernel for fn in KERNELS for kernel in fn.device_caches[self.device][0].values()]


def per_thread(kernel, constant="BLOCK"):
    """Elements of a tile for each thread; or of what else as many lanes have."""
    lanes = kernel.src.constants[(kernel.src.fn.arg_names.index(constant),)]
    return lanes / (kernel.metadata.num_warps * kernel.metadata.target.warp_size)


def tiles_at_once(kernel):
    """How many a program that takes several takes of large tensors."""
    return means.CHUNK if "chunks" in kernel.src.fn.arg_names else math.inf


def unfenced(kernel):
    """How many stores of elements follow loads of elements with no barrier between them: where one thread stores what
    another has read, this must be 0. For NVIDIA."""
    found, loaded = 0, False
    for line in kernel.asm.get("ptx", "").splitlines():
        if "bar.sync" in line:
            loaded = False
        elif "ld.global" in line and "evict_first" in line:
            loaded = True
        elif "st.global.cs" in line:
            found += loaded
    return found


def facts(kernel):
    """What assembly and metadata say of a kernel."""
    found = {"name": kernel.metadata.name, "shared": kernel.metadata.shared}
    assembly = kernel.asm["ptx"] if "ptx" in kernel.asm else kernel.asm["amdgcn"]
    # Behind a predicate such as @%p1, and in front of the operands.
    found["opcodes"] = collections.Counter(re.findall(r"^\s+(?:@!?%\w+\s+)?([a-z][\w.:]*)", assembly, re.MULTILINE))
    if "ptx" in kernel.asm:
        return found | resources(kernel.asm["cubin"])
    numbers = {key: int(value) for key, value in re.findall(r"\.(\w+):\s+(\d+)\s*$", assembly, re.MULTILINE)}
    # Scalar registers are spilled to lanes of vector registers, which costs no memory.
    stack = numbers["private_segment_fixed_size"] + numbers["vgpr_spill_count"]
    return found | {"registers": numbers["vgpr_count"], "stack": stack}


def resources(cubin):
    """Registers per thread, and bytes of stack, which is where spilled ones go: from ptxas' own books."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
    usage = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text.stdout + text.stderr)
    registers, stack, local = map(int, usage.groups())
    return {"registers": registers, "stack": stack + local}
