"""The parts of gpu.py that check what no machine without a GPU can."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import torch
from device import bits
from gpu_run import Run
from measure import outline
from problem import Case, Problem

import fusedopt
from fusedopt import occupancy

HERE = Path(__file__).parent


def equal(run: Run) -> None:
    """Every rule on the GPU and in Triton's interpreter: the same bits, at both addresses, with and without stages."""
    # The one compiles for minutes, and so long the other interprets.
    count = 1 if run.dry else max(1, (os.cpu_count() or 1) // 2)
    with tempfile.TemporaryDirectory() as folder:
        interpreter = {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
        started = []
        for part, (where, more) in itertools.product(range(count), {"here": {}, "interpreted": interpreter}.items()):
            path = Path(folder) / f"{where}-{part}.pt"
            command = [sys.executable, HERE / "trajectories.py", path, f"{part}/{count}", *["--few"][: run.dry]]
            started.append((subprocess.Popen(command, env=os.environ | more), path))
        for part, pair in enumerate(zip(started[::2], started[1::2])):
            codes = [process.wait() for process, _ in pair]
            if any(codes):
                run.result("equal", f"part {part} of {count}", "failed", f"exit codes {codes}")
            else:
                _compare(run, *(torch.load(path) for _, path in pair))


def _compare(run: Run, found: dict[str, list[torch.Tensor]], expected: dict[str, list[torch.Tensor]]) -> None:
    for label, tensors in found.items():
        pairs = list(zip(tensors, expected[label], strict=True))
        differ = sum((bits(a) != bits(b)).sum().item() for a, b in pairs)
        total = sum(a.numel() for a, _ in pairs)
        worst = max((a.double() - b.double()).abs().max().item() for a, b in pairs)
        note = f"{differ} of {total} values differ, by at most {worst:.2g}"
        run.result("equal", label, "ok" if differ == 0 else "failed", note)


def stress(run: Run) -> None:
    """10,000 clipped steps by one launch and by two, alone and beside another stream that keeps the GPU busy: the same
    bits, and no hang. Then a cooperative launch of more programs than the GPU runs at a time, which it must refuse."""
    steps, size = (3, 64) if run.dry else (10_000, 4096)
    problem = Problem(Case("resnet50", "AdamW", clip=True), run.models["resnet50"], run.on.name, run.backend)
    a = torch.randn(size, size, device=run.on.name)
    b = torch.empty_like(a)
    ended = {}
    for launches, crowded in itertools.product((2, 1), (False, True)):
        name = f"{steps} steps by {launches} launch{'es' * (launches > 1)}{', crowded' * crowded}"
        groups = problem.parameters()
        optimizer = fusedopt.AdamW(groups, max_grad_norm=1e-3, launches=launches, **problem.settings)
        begin = time.perf_counter()
        norms = []
        for number in range(steps):
            if crowded and number % 10 == 0:
                run.on.alongside(lambda: torch.mm(a, a, out=b))
            optimizer.step()
            if number % (steps // 3) == 0:
                norms.append(optimizer.grad_norm)
        run.on.settle()
        ended[name] = [p.detach().clone() for group in groups for p in group["params"]] + norms
        took = time.perf_counter() - begin
        run.result("stress", name, "ok", f"{took / steps * 1e6:.1f} us per step")
    first, *others = ended.items()
    finite = all(x.isfinite().all() for x in first[1])
    for name, tensors in others:
        same = all(torch.equal(bits(x), bits(y)) for x, y in zip(first[1], tensors, strict=True))
        note = f"equal to {first[0]}: {same}, finite: {finite}"
        run.result("stress", f"the same bits, {name}", "ok" if same and finite else "failed", note)
    run.result("stress", "too large a grid", *too_large_a_grid(run, problem))


def too_large_a_grid(run: Run, problem: Problem) -> tuple[str, str]:
    """What the driver says to it, and whether the optimizer goes on with two launches."""
    if run.where == "cpu":
        return "skipped", "the interpreter runs one program after the other"
    optimizer = fusedopt.AdamW(problem.parameters(), max_grad_norm=1e-3, launches=1)
    with mock.patch.object(occupancy, "largest_grid", lambda *args: 1 << 20):
        try:
            optimizer.step()
        except RuntimeError as error:
            refusal = str(error)
        else:
            return "failed", "the driver took it"
    optimizer.launches = 2
    optimizer.step()
    run.on.settle()
    return "ok" if "refuses a cooperative launch" in refusal else "failed", refusal


def graph(run: Run) -> None:
    """A captured step, replayed with a changing learning rate: the eager step's bits, and its time."""
    case = Case("gpt2", "AdamW", clip=True)
    problem = Problem(case, run.models["gpt2"], run.on.name, run.backend)
    ended, walls = [], []
    for captured in (False, True):
        groups = problem.parameters()
        params = [p for group in groups for p in group["params"]]
        lr = torch.tensor(1e-3, device=run.on.name)
        optimizer = fusedopt.AdamW(params, lr=lr, max_grad_norm=1e-3, capturable=True, **problem.settings)
        run.on.settle()  # before another stream reads what was made here
        try:
            for _ in range(3):
                run.on.alongside(optimizer.step)
        except RuntimeError as error:
            run.result("graph", "capturable=True", "skipped", str(error))
            return
        run.on.settle()
        replay = run.on.capture(optimizer.step) if captured else optimizer.step
        # A capture runs nothing on a GPU; without one it is the step itself, and nothing was run either.
        begin = time.perf_counter()
        for number in range(20):
            lr.fill_(1e-3 / (1 + number))
            replay()
        run.on.settle()
        walls.append((time.perf_counter() - begin) / 20)
        ended.append([p.detach() for p in params])
    same = all(torch.equal(bits(x), bits(y)) for x, y in zip(*ended))
    note = f"same bits as eager: {same}; {walls[1] * 1e6:.1f} us per replay, {walls[0] * 1e6:.1f} us eager"
    run.result("graph", "replay", "ok" if same else "failed", note)


def cold(run: Run) -> None:
    """The first step in a new process, with Triton's cache empty and then filled."""
    with tempfile.TemporaryDirectory() as cache:
        for state in run.few(("empty", "filled")):
            command = [sys.executable, str(HERE / "first_step.py"), "tiny" if run.dry else "resnet50"]
            done = subprocess.run(
                command, env=os.environ | {"TRITON_CACHE_DIR": cache}, capture_output=True, text=True, check=True
            )
            for optimizer, first_ms in json.loads(done.stdout).items():
                case, name = Case("resnet50", optimizer, clip=True), f"fusedopt, Triton's cache {state}"
                note = f"first step after {first_ms} ms"
                run.write(outline(case, run.on, "cold", name, run.models, first_ms=first_ms, note=note))


def huge(run: Run) -> None:
    """A tensor of 2^31 + 8 elements: indices that int32 cannot hold. Compared with the same numbers in a small one."""
    size = 5000 if run.dry else 2**31 + 8
    needed = 16 * size  # parameter and gradient, two states
    if run.on.name == "cuda" and torch.cuda.mem_get_info()[0] < 1.1 * needed:
        run.result("huge", f"{size} elements", "skipped", f"needs {needed / 1e9:.0f} GB of GPU memory")
        return
    period = 1000  # each stretch of it is the same, so that a small tensor says what the large one should be
    pattern = torch.linspace(0.5, 1.5, period, device=run.on.name)
    places = [0, size // 2, size - 16]  # the last ones reach over 2^31
    p = torch.nn.Parameter(pattern.repeat(-(-size // period))[:size])
    p.grad = p.detach() * 0.1
    q = torch.nn.Parameter(pattern.clone())
    q.grad = q.detach() * 0.1
    ours = [fusedopt.AdamW([x], lr=1e-2, **({"backend": run.backend} if run.backend else {})) for x in (p, q)]
    for _ in range(2):
        for optimizer in ours:
            optimizer.step()

    def right(place: int) -> bool:
        expected = q.detach()[torch.arange(place, place + 16) % period]
        return torch.equal(p.detach()[place : place + 16], expected)

    wrong = [place for place in places if not right(place)]
    run.result("huge", f"{size} elements", "failed" if wrong else "ok", f"wrong from elements {wrong}" if wrong else "")


TOOLS = "memcheck", "racecheck"

RESERVE = 5
"""Seconds in which to write down what a tool that is cut off has said."""


def sanitize(run: Run) -> None:
    """Steps of every kernel under CUDA's compute-sanitizer, where that is installed."""
    program = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not (run.dry or Path(program).exists()):
        run.result("sanitize", "compute-sanitizer", "skipped", "it is not installed")
        return
    command = [sys.executable, str(HERE / "every_kernel.py"), *(["--few"] if run.dry else [])]
    if not run.dry:
        subprocess.run(command, check=False)  # under a tool compiling would take several times as long
    tools = run.few(TOOLS)
    for number, tool in enumerate(tools):
        under = [] if run.dry else [program, "--tool", tool, "--error-exitcode", "1"]
        seconds = (run.end - RESERVE - time.monotonic()) / (len(tools) - number)
        code, text = _within(seconds, [*under, *command], run.out / f"{tool}.txt")
        lines = [line for line in text.splitlines() if "ERROR SUMMARY" in line or "Error" in line]
        ended = f"cut off behind {text.splitlines()[-1:]}" if code is None else f"exit code {code}"
        run.result("sanitize", tool, "ok" if code == 0 else "failed", f"{ended}; {'; '.join(lines[:3])}")


def _within(seconds: float, command: list[str], log: Path) -> tuple[int | None, str]:
    """Run it for so long at most: its exit code, None if it was cut off, and what it had printed by then."""
    with log.open("w") as file:
        try:
            # Without torch's cache every tensor is an allocation of its own, whose ends are watched.
            code = subprocess.run(
                command, env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, stdout=file, stderr=file,
                timeout=max(seconds, 0), check=False,
            ).returncode  # fmt: skip
        except subprocess.TimeoutExpired:
            code = None
    return code, log.read_text(errors="replace")
