"""Time the optimizers' step against torch.optim and other packages, in one process, as ratios of interleaved rounds.

    python bench/step.py --models mlp --optimizers AdamW --clip [--save]

cpu.py and gpu.py choose the cases for a whole machine.

torch's candidates are its for-loop, foreach and fused implementations, each with ``clip_grad_norm_`` where clipping is
on; the best of them by median is what a ratio compares with. Who is not timed stands in the table with the reason.
``--save`` appends every row to bench/history.csv as soon as it is measured, whatever it says.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import time
from collections.abc import Iterable
from typing import Any

import torch
from device import Cpu, device
from history import HISTORY, Row, append
from measure import Result, measure, rows
from problem import Case
from rivals import IMPLEMENTATIONS
from shapes import GPU_ONLY, MODELS
from variants import VARIANTS

from fusedopt.__main__ import amount

USUAL = ("fusedopt", "fusedopt flatten", "forloop", "foreach", "fused")
"""Compiling the step takes torch seconds to minutes per case, and most packages run on GPUs only: ask for them."""

HEADER = (
    f"{'model':10} {'optimizer':25} {'case':13} {'implementation':17} {'wall us':>9} {'host us':>9} {'device us':>9}   "
    f"{'best of torch':19} ratio (quartiles)"
)


def case_seconds(case: Case, on: Cpu) -> float:
    """How long the rounds of a case should last: longer where a step takes a tenth of a second."""
    if on.name == "cuda":
        return 0.5
    return 4.0 if case.model in ("gpt2", "one50m") else 1.0


def line(row: Row) -> str:
    """One row of the table."""
    marks = " ".join([row.dtype, *(["clip"] if row.clip else []), *(["amp"] if row.amp else [])])
    start = f"{row.model:10} {row.optimizer:25} {marks:13} {row.implementation:17}"
    if row.status != "ok" or row.wall_us is row.device_us is None:
        return f"{start} {row.status}: {row.note}"
    times = " ".join(f"{'' if x is None else x:>9}" for x in (row.wall_us, row.host_us, row.device_us))
    if row.ratio is None:
        return f"{start} {times}"
    ratio = f"{row.ratio:.2f} ({row.ratio_low:.2f} to {row.ratio_high:.2f})"
    return f"{start} {times}   {row.rival:9} {row.rival_us:>9} {ratio}"


def run(
    cases: Iterable[Case],
    names: Iterable[str],
    on: Cpu,
    seconds: float | None = None,
    deadline: float = float("inf"),
    out: pathlib.Path | None = None,
    **options: Any,
) -> list[Row]:
    """Measure and print cases, and write them to ``out`` and its JSON as they come. Says which were left out where
    time ran out."""
    names, made, left = list(names), [], []
    for case in cases:
        if time.monotonic() > deadline:
            left.append(case)
            continue
        results = measure(case, names, on, case_seconds(case, on) if seconds is None else seconds, **options)
        new = rows(case, results, on, options.get("models", MODELS))
        made += new
        print(*map(line, new), sep="\n", flush=True)
        if out is not None:
            append(new, out)
            write_raw(case, results, out)
    if left:
        print(f"out of time, not measured: {', '.join(map(str, left))}", flush=True)
    return made


def write_raw(case: Case, results: list[Result], out: pathlib.Path) -> None:
    """Every single time, one JSON object per line, beside the rows."""
    with out.with_suffix(".jsonl").open("a") as file:
        for result in results:
            file.write(json.dumps({"case": case._asdict(), **vars(result)}, default=str) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS)
    parser.add_argument("--optimizers", nargs="+", choices=VARIANTS)
    parser.add_argument("--implementations", nargs="+", choices=IMPLEMENTATIONS, default=USUAL)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--clip", action=argparse.BooleanOptionalAction, help="only with, or only without")
    parser.add_argument("--amp", action="store_true", help="with a GradScaler")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: a GPU where there is one")
    parser.add_argument("--threads", type=amount, default=1, help="of the CPU (default: %(default)s)")
    parser.add_argument("--seconds", type=float, help="per case, at least five rounds (default: by the case)")
    parser.add_argument("--save", action="store_true", help="append the rows to --out")
    parser.add_argument("--out", type=pathlib.Path, default=HISTORY, help="default: bench/history.csv")
    options = parser.parse_args()
    on = device(options.device)
    torch.set_num_threads(options.threads)
    models = options.models or [model for model in MODELS if on.name == "cuda" or model not in GPU_ONLY]
    clips = (False, True) if options.clip is None else (options.clip,)
    cases = [
        Case(model, label, clip, options.amp, options.dtype)
        for model in models for label in options.optimizers or VARIANTS for clip in clips
    ]  # fmt: skip
    print(HEADER)
    run(cases, options.implementations, on, options.seconds, out=options.out if options.save else None)


if __name__ == "__main__":
    main()
