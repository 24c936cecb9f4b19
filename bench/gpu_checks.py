"""The parts of gpu.py that check what no machine without a GPU can."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from gpu_run import Run
from measure import outline
from problem import Case, Problem

import fusedopt

HERE = Path(__file__).parent


def equal(run: Run) -> None:
    """Every rule on the GPU and in Triton's interpreter: the same bits, at both addresses, with and without stages."""
    from interpreted import trajectories

    device = torch.device(run.on.name)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "interpreted.pt"
        command = [sys.executable, str(HERE / "interpreted.py"), str(path), *(["--few"] if run.dry else [])]
        subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}, check=True)
        expected = torch.load(path)
    for label, tensors in trajectories(device, few=run.dry):
        pairs = list(zip(tensors, expected[label], strict=True))
        differ = sum((bits(a.cpu()) != bits(b)).sum().item() for a, b in pairs)
        total = sum(a.numel() for a, _ in pairs)
        worst = max((a.cpu().double() - b.double()).abs().max().item() for a, b in pairs)
        note = f"{differ} of {total} values differ, by at most {worst:.2g}"
        run.result("equal", label, "ok" if differ == 0 else "failed", note)


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def stress(run: Run) -> None:
    """10,000 clipped steps, alone and beside another stream that keeps the GPU busy: the same bits, and no hang."""
    steps, size = (3, 64) if run.dry else (10_000, 4096)
    problem = Problem(Case("resnet50", "AdamW", clip=True), run.models["resnet50"], run.on.name, run.backend)
    a = torch.randn(size, size, device=run.on.name)
    b = torch.empty_like(a)
    ended = []
    for crowded in (False, True):
        groups = problem.parameters()
        optimizer, step = problem.made("fusedopt", groups, limit=1e-3)
        begin = time.perf_counter()
        norms = []
        for number in range(steps):
            if crowded and number % 10 == 0:
                run.on.alongside(lambda: torch.mm(a, a, out=b))
            step()
            if number % (steps // 3) == 0:
                norms.append(optimizer.grad_norm)
        run.on.settle()
        ended.append([p.detach().clone() for group in groups for p in group["params"]] + norms)
        took = time.perf_counter() - begin
        run.result("stress", f"{steps} steps{', crowded' * crowded}", "ok", f"{took / steps * 1e6:.1f} us per step")
    same = all(torch.equal(bits(x), bits(y)) for x, y in zip(*ended))
    finite = all(x.isfinite().all() for x in ended[0])
    run.result("stress", "the same bits", "ok" if same and finite else "failed", f"equal: {same}, finite: {finite}")


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
        try:
            for _ in range(3):
                run.on.alongside(optimizer.step)
        except RuntimeError as problem:
            run.result("graph", "capturable=True", "skipped", str(problem))
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
