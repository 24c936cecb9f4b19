"""Time ``optimizer.step()`` against torch.optim's best, in one process, as ratios of interleaved rounds.

    python bench/step.py [--models ...] [--optimizers ...] [--clip | --no-clip] [--save]

torch's candidates are its for-loop, foreach and fused implementations, each with ``clip_grad_norm_``
where clipping is on; the best of them by median is what a row compares with. ``--save`` appends the
rows to bench/history.csv, whatever they say.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import datetime
import gc
import os
import pathlib
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator

import torch
from shapes import MODELS

import fusedopt

HISTORY = pathlib.Path(__file__).with_name("history.csv")

VARIANTS = {
    "SGD": ("SGD", {}),
    "SGD-momentum": ("SGD", {"momentum": 0.9}),
    "Adagrad": ("Adagrad", {}),
    "RMSprop": ("RMSprop", {}),
    "RMSprop-centered-momentum": ("RMSprop", {"centered": True, "momentum": 0.9}),
    "Adam": ("Adam", {}),
    "AdamW": ("AdamW", {}),
}
MAX_NORM = 1.0


@dataclasses.dataclass
class Row:
    date: str
    commit: str
    machine: str
    device: str
    threads: int
    torch: str
    triton: str
    model: str
    optimizer: str
    clip: bool
    setting: str
    ours_us: float
    best_us: float
    best: str
    ratio: float
    ratio_low: float
    ratio_high: float
    rounds: int


def steppers(
    model: str, variant: str, clip: bool, device: str, only: str | None = None
) -> Iterator[tuple[str, Callable[[], None]]]:
    """(name, one step) for torch's implementations and ours, each on tensors of its own. The gradients
    are shared: nobody keeps them, and clipping them again changes nothing that costs time. ``only`` names
    one of them."""
    name, options = VARIANTS[variant]
    groups = MODELS[model]
    grads = [[torch.randn(shape, device=device) * 1e-3 for shape in group] for group in groups]

    def parameters() -> list[dict]:
        made = []
        for number, (group, group_grads) in enumerate(zip(groups, grads)):
            params = [torch.nn.Parameter(torch.randn(shape, device=device) * 0.1) for shape in group]
            for p, g in zip(params, group_grads):
                p.grad = g
            made.append({"params": params, "lr": 1e-4 * (1 + number / len(groups))})
        return made

    for implementation in ("forloop", "foreach", "fused"):
        if only not in (None, implementation):
            continue
        choice = {"foreach": implementation == "foreach"}
        if implementation == "fused":
            choice = {"fused": True}
        made = parameters()
        try:
            optimizer = getattr(torch.optim, name)(made, lr=1e-4, **options, **choice)
        except TypeError:
            continue  # torch has no fused implementation of it
        everything = [p for group in made for p in group["params"]]
        yield implementation, _torch_step(optimizer, everything, clip)
    norm = {"max_grad_norm": MAX_NORM} if clip else {}
    for setting in ("default", "flatten"):
        if only not in (None, setting):
            continue
        cls = getattr(fusedopt, name)
        yield setting, cls(parameters(), lr=1e-4, **options, **norm, flatten=setting == "flatten").step


def _torch_step(optimizer: torch.optim.Optimizer, params: list[torch.Tensor], clip: bool) -> Callable[[], None]:
    def step() -> None:
        if clip:
            torch.nn.utils.clip_grad_norm_(params, MAX_NORM)
        optimizer.step()

    return step


def measure(model: str, variant: str, clip: bool, device: str, seconds: float) -> list[Row]:
    cases = dict(steppers(model, variant, clip, device))
    times: dict[str, list[float]] = {name: [] for name in cases}
    longest = 0.0
    for _ in range(2):  # the first call builds states and plans
        for step in cases.values():
            longest = max(longest, timed(step, device, 1))
    inner = max(1, int(0.004 / max(longest, 1e-7)))
    deadline = time.perf_counter() + seconds
    names = list(cases)
    while len(times[names[0]]) < 5 or (time.perf_counter() < deadline and len(times[names[0]]) < 60):
        for name in names:
            times[name].append(timed(cases[name], device, inner))
        names.append(names.pop(0))  # nobody always comes first
    rivals = [name for name in cases if name in ("forloop", "foreach", "fused")]
    best = min(rivals, key=lambda name: statistics.median(times[name]))
    rows = []
    for setting in ("default", "flatten"):
        low, ratio, high = statistics.quantiles([a / b for a, b in zip(times[setting], times[best])], n=4)
        rows.append(
            Row(
                **surroundings(device), model=model, optimizer=variant, clip=clip, setting=setting,
                ours_us=round(statistics.median(times[setting]) * 1e6, 1),
                best_us=round(statistics.median(times[best]) * 1e6, 1), best=best,
                ratio=round(ratio, 3), ratio_low=round(low, 3), ratio_high=round(high, 3), rounds=len(times[best]),
            )
        )  # fmt: skip
    return rows


def timed(step: Callable[[], None], device: str, repeats: int) -> float:
    """Seconds per step, the device's work included."""
    settle(device)
    start = time.perf_counter()
    for _ in range(repeats):
        step()
    settle(device)
    return (time.perf_counter() - start) / repeats


def settle(device: str) -> None:
    """Wait for the device."""
    if device == "cuda":
        torch.cuda.synchronize()


def surroundings(device: str) -> dict:
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = "none"
    commit = os.environ.get("FUSEDOPT_COMMIT") or subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=pathlib.Path(__file__).parent, capture_output=True, text=True, check=False,
    ).stdout.strip()  # fmt: skip
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit,
        "machine": torch.cuda.get_device_name() if device == "cuda" else processor(),
        "device": device,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": triton_version,
    }


def processor() -> str:
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def save(rows: list[Row], path: pathlib.Path = HISTORY) -> None:
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in dataclasses.fields(Row)])
        if new:
            writer.writeheader()
        writer.writerows(map(dataclasses.asdict, rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--optimizers", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--clip", action=argparse.BooleanOptionalAction, help="only with, or only without")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=4.0, help="per case (at least 5 rounds)")
    parser.add_argument("--save", action="store_true", help="append the rows to bench/history.csv")
    parser.add_argument("--out", type=pathlib.Path, default=HISTORY, help="where --save writes")
    options = parser.parse_args()
    torch.manual_seed(0)
    print("model      optimizer                  clip  setting     ours us    best us best     ratio (quartiles)")
    for model in options.models:
        for variant in options.optimizers:
            for clip in (False, True) if options.clip is None else (options.clip,):
                rows = measure(model, variant, clip, options.device, options.seconds)
                for r in rows:
                    print(
                        f"{r.model:10} {r.optimizer:26} {r.clip!s:5} {r.setting:8} {r.ours_us:10.1f} {r.best_us:10.1f} "
                        f"{r.best:8} {r.ratio:.2f} ({r.ratio_low:.2f} to {r.ratio_high:.2f})",
                        flush=True,
                    )
                if options.save:
                    save(rows, options.out)
                gc.collect()


if __name__ == "__main__":
    main()
