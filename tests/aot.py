"""Compile what the optimizers launch, for GPUs that are not there.

A program of its own, since Triton's interpreter and its compiler cannot live in one process::

    python tests/aot.py sm_90:float32 gfx942:mixed sm_90:stored launches

prints JSON: facts about every kernel for a target and dtypes, or for a target and the forms in which values
are stored, and how often 30 steps compile. Whole optimizer steps run on CPU tensors: planning, tables, Triton's
binder and cache, its compiler and ptxas are the real ones, and only the launch does nothing.
"""

import collections
import gc
import json
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from unittest import mock

import extents
import torch
import triton
import without_dynamo
from absent_gpu import NoGPU, facts, per_thread, tiles_at_once, unfenced
from form_cases import FORMS, forms_at_once, stored_cases
from rule_cases import ADDRESSES, AT_ONCE, CASES, CHAINS, WITH_MEANS, optimizer, parameters, set_gradients
from triton.runtime import driver

from fusedopt import backends, launch, means, triton_ahead
from fusedopt.skips import Skips

# The benchmarks' reading of machine code.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "bench"))
from assembly import disassemble, whole_tiles

DTYPES = {
    # Of parameter and gradient, and of the states.
    "float32": (torch.float32, torch.float32),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "float64": (torch.float64, torch.float64),
    "mixed": (torch.bfloat16, torch.float32),
}

EXTENT = os.environ.get("FUSEDOPT_COMPILE", "some")
"""How much: see extents.py."""

MOST = 8
"""Processes at a time: each takes half a gigabyte."""


def step_once(case, address, dtype, scaler=False, **settings):
    """One step of a small model whose states have their own dtype, with or without what a GradScaler attaches."""
    param, state = DTYPES[dtype]
    params = parameters([5000, 33], "cpu", param)
    made = optimizer(case, params, address, **settings)
    if scaler:
        made.grad_scale, made.found_inf = torch.ones(1), torch.zeros(1)
    for p in params:
        p.grad = torch.ones_like(p) if p.grad is None else p.grad
        for key in made.rule(made.param_groups[0]).keys:
            made.state[p] |= {key: torch.zeros_like(p, dtype=state), "step": torch.tensor(1.0)}
    made.step()
    return made


CLIPPED_ADAMW = {"max_grad_norm": 1.0, "weight_decay": 0.1, "decoupled": True}
COUNTED = "nearest + 8bit", "split8 + 8bit"
"""The step, and the forms, whose instructions per element are counted: everything that a thread does."""


def step_stored(case, address, form, **settings):
    """One step of a small model of bfloat16 parameters in that form, all large enough to have quantized states."""
    params = parameters([5000, 9001], "cpu", torch.bfloat16)
    made = optimizer(case, params, address, **FORMS[form], **settings)
    set_gradients(params, [torch.ones_like(p) for p in params])
    made.step()
    return made


def stored_facts(target):
    """Facts about the update in every form, with the norm and clipping before it."""
    gpu = NoGPU(target, "stored")
    driver.set_active(gpu)
    for case, form in stored_cases(EXTENT, target):
        before = set(gpu.compiled())
        made = step_stored(case, "scattered", form, **(CLIPPED_ADAMW if target == "sm_90" else {"max_grad_norm": 1.0}))
        (stored,) = {bucket.stored for bucket in made._engine.plan.buckets}
        for kernel in set(gpu.compiled()) - before:
            if kernel.metadata.name.startswith("step_"):
                parts = [(part.dtype.itemsize, part.per) for _, role in stored.roles for part in role.parts]
                found = facts(kernel) | {"form": form, "parts": parts, "per_thread": per_thread(kernel)}
                if target == "sm_90" and case == "adam" and form in COUNTED:
                    found["instructions"] = whole_tiles(disassemble(kernel)).instructions / per_thread(kernel)
                yield found
    for form in forms_at_once(EXTENT, target):
        before = set(gpu.compiled())
        step_stored("adam", "scattered", form, max_grad_norm=1.0, launches=1)
        for kernel in set(gpu.compiled()) - before:
            if kernel.metadata.name.startswith("clipped_"):
                yield facts(kernel) | {"form": form}


def all_facts(target, dtype):
    """Facts about every rule x address with everything around it, and about the norm kernels."""
    gpu = NoGPU(target, dtype)
    driver.set_active(gpu)
    addresses = extents.compiled_addresses(target, dtype, EXTENT)
    clips, norm = CHAINS["all"] | {"max_grad_norm": None}, {"max_grad_norm": 1.0, "skip_nonfinite": True}
    runs = []
    for address in addresses:
        rules = extents.compiled_rules(target, dtype, address, EXTENT)
        cases = [case for case in CASES if case.split()[0] in rules and WITH_MEANS.get(case) != {}]
        runs += [(case, address, clips | norm) for case in cases]
    everything = extents.is_whole(target, dtype, EXTENT)
    if everything:
        # Unscaling by the norm kernel, and, where no norm is needed, by a kernel of its own.
        runs += [("adam", "scattered", clips | settings | {"scaler": True}) for settings in (norm, {})]
    without = len(runs)
    for address in addresses:
        with_means = extents.compiled_means(target, dtype, address, EXTENT)
        runs += [(case, address, clips | norm | settings) for case, settings in with_means.items()]
    end = len(runs)
    runs += [
        (case, "scattered", clips | norm | {"launches": 1}) for case in extents.compiled_at_once(target, dtype, EXTENT)
    ]
    tracked = clips | norm | {"track": "total"}
    if extents.is_tracked(target, dtype, EXTENT):
        runs += [("adam", address, tracked) for address in addresses]
    runs += [("adam", "scattered", tracked | {"launches": 1})] * everything
    for i, (case, address, settings) in enumerate(runs):
        before = set(gpu.compiled())
        step_once(case, address, dtype, **settings)
        for kernel in set(gpu.compiled()) - before:
            more = {"case": case, "means": without <= i < end, "tracked": "track" in settings}
            if more["tracked"] and kernel.metadata.name.endswith("_adam"):
                more |= {"per_thread": per_thread(kernel), "sums_per_thread": per_thread(kernel, "LANES")}
            yield facts(kernel) | {"address": address, "dtype": dtype} | more


def zeroing_facts(target):
    """Facts about Adam's updates that leave zeros in place of the gradients, and about the same without."""
    for flat_grads in ("zeroed", True):
        gpu = NoGPU(target, f"flat_grads {flat_grads}")
        driver.set_active(gpu)
        for address, dtype, settings in extents.zeroing_cases(EXTENT):
            before = set(gpu.compiled())
            # Large enough to have quantized states.
            params = parameters([5000], "cpu", getattr(torch, dtype))
            made = optimizer("adam", params, address, max_grad_norm=1.0, flat_grads=flat_grads, **settings)
            made.zero_grad()
            made.step()
            for kernel in set(gpu.compiled()) - before:
                if kernel.metadata.name.endswith("_adam"):
                    found = facts(kernel) | {"zeroes": flat_grads == "zeroed", "unfenced": unfenced(kernel)}
                    yield found | {"dtype": dtype, "quantizes": "state_dtype" in settings}


def units_facts(target):
    """Facts about Adam's kernels with adaptive clipping, in two launches and in one."""
    for dtype in extents.units_dtypes(EXTENT):
        gpu = NoGPU(target, f"{dtype} units")
        driver.set_active(gpu)
        for settings in ({}, {"launches": 1}):
            step_once("adam", "scattered", dtype, **CHAINS["clip norm"], adaptive_grad_clip=0.1, **settings)
        yield from (facts(kernel) | {"dtype": dtype} for kernel in gpu.compiled())


def instructions_per_element(dtype):
    """Of Adam on sm_90, plain and with averages and norms: once around the loop over tiles, and, shared by all tiles
    of a program, adding up its threads."""
    found = []
    for settings in ({}, {"ema_decay": 0.9, "track": "total"}):
        gpu = NoGPU("sm_90", f"{dtype} {settings}")
        driver.set_active(gpu)
        step_once("adam", "scattered", dtype, **CHAINS["clip norm"], **settings)
        (kernel,) = (k for k in gpu.compiled() if k.metadata.name.endswith("_adam"))
        program = disassemble(kernel)
        way = whole_tiles(program)
        way = way.instructions + way.before / tiles_at_once(kernel)
        exchanges = [n for n, instruction in enumerate(program) if "SHFL" in instruction.text]
        if exchanges:
            # Behind the last exit stand the subroutines for numbers near the ends of the range.
            end = max(n for n, instruction in enumerate(program) if "EXIT" in instruction.text)
            way += (end + 1 - exchanges[0]) / means.CHUNK
        block = kernel.src.constants[kernel.src.fn.arg_names.index("BLOCK"),]
        found.append(way * kernel.metadata.num_warps * 32 / block)
    return found


def compiles(case, address, **more):
    """How often each kernel is compiled over 30 steps with every number changing, by two models."""
    gpu = NoGPU("sm_90", f"{case} {address} {more}")
    driver.set_active(gpu)
    for sizes in ([5000, 33, 1024], [16]):
        params = parameters(sizes, "cpu")
        # As in all_facts(), whose kernels are then found in Triton's cache.
        settings = CHAINS["all"] | {"skip_nonfinite": True} | more
        made = optimizer(case, [{"params": [p]} for p in params], address, **settings)
        for t in range(30):  # after which all combinations of what repeats were there
            set_gradients(params, [torch.ones(size) for size in sizes])
            for i, group in enumerate(made.param_groups):
                # Triton looks at integers, and 1 and multiples of 16 are special to it.
                group["lr"] = (1, 0, 16, 0.5 / (t + 1), True)[(t + i) % 5]
                group["weight_decay"] = (1, 16, 0.1 * (t + 1))[(t + i) % 3]
            made.max_grad_norm = (1, 16, 0.3 * (t + 1))[t % 3]
            made.max_grad_value = (None, (1, 16, 0.3 * (t + 1))[t % 3])
            # As if every second step had been skipped, and the host had not yet heard of some.
            if t:
                made._engine.skips.tensor[3] += t % 2
            with mock.patch.object(Skips, "variants", 1 + t // 3):
                made.step()
    return collections.Counter(kernel.metadata.name for kernel in gpu.compiled())


def launches():
    """How often each kernel is compiled, by case."""
    found = {f"{case}, {a}": compiles(case, a) for a in ADDRESSES for case in extents.launched_cases(a, EXTENT)}
    found |= {f"{case}, at once": compiles(case, "scattered", launches=1) for case in AT_ONCE[:1]}
    found |= {"adam, tracked": compiles("adam", "flat", track="total")}
    found |= {"adam, units": compiles("adam", "flat", adaptive_grad_clip=0.1)}
    with_means = extents.compiled_means("sm_90", "float32", "scattered", EXTENT)
    return found | {f"{case}, means": compiles(case, "scattered", **more) for case, more in with_means.items()}


def report(job):
    if job == "instructions":
        return {dtype: instructions_per_element(dtype) for dtype in extents.counted_dtypes(EXTENT)}
    if job == "launches":
        return launches()
    target, what = job.split(":")
    found = {"stored": stored_facts, "zeroed": zeroing_facts, "units": units_facts}.get(what)
    return list(all_facts(target, what) if found is None else found(target))


def main(jobs):
    # Every launch goes through Triton's binder, which says whether a compiled kernel serves it.
    launch.DIRECT = False
    # CPU tensors are taken for those of the GPU.
    backends._device_problem = lambda device, requested: None
    # Every processor compiles already: threads would take each other's lock, Triton 3.6's at every instruction that it
    # forms, and then five times as long. That they make the same kernels is asked in test_ahead.py.
    triton_ahead._side_by_side = lambda compilations: None
    without_dynamo.prepare()
    # What every worker would look through at every collection of garbage, which compiling sets off often.
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000)
    workers = min(os.cpu_count(), MOST, len(jobs))
    with ProcessPoolExecutor(workers, multiprocessing.get_context("fork")) as pool:
        print(json.dumps({"triton": triton.__version__, **dict(zip(jobs, pool.map(report, jobs)))}))


if __name__ == "__main__":
    main(sys.argv[1:])
