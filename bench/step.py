"""Time the optimizers' step against torch.optim and other packages, in one process, as ratios of interleaved rounds.

    python bench/step.py --save                     all cases of this machine, most important first, in 12 minutes
    python bench/step.py --models mlp --optimizers AdamW --clip

torch's candidates are its for-loop, foreach and fused implementations, each with ``clip_grad_norm_`` where clipping is
on; the best of them by median is what a ratio compares with. Who is not timed stands in the table with the reason.
``--save`` appends every row to bench/history.csv as soon as it is measured, whatever it says.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import time
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from device import Cpu, device
from history import HISTORY, Row, append
from measure import Result, measure, rows
from problem import Case
from rivals import IMPLEMENTATIONS
from shapes import GPU_ONLY, MODELS
from variants import VARIANTS

USUAL = ("fusedopt", "fusedopt flatten", "forloop", "foreach", "fused")
"""Compiling the step takes torch seconds to minutes per case, and most packages run on GPUs only: ask for them."""

SMALL = "mlp", "small1000", "groups465"
FIRST = "AdamW", "SGD", "SGD-momentum", "RMSprop", "Adam", "Adagrad", "RMSprop-centered-momentum"
LARGE = {"gpt2": ("AdamW", "RMSprop", "SGD"), "one50m": ("AdamW", "RMSprop", "SGD-momentum")}
"""A step of these takes a tenth of a second and more on a CPU: there, of each kind of formula one."""

HEADER = (
    f"{'model':10} {'optimizer':25} {'case':13} {'implementation':17} {'wall us':>9} {'host us':>9} {'device us':>9}   "
    f"{'best of torch':19} ratio (quartiles)"
)


def plan(on: Cpu) -> Iterator[Case]:
    """Every case of this machine, most important first."""
    order = [*FIRST, *(label for label in VARIANTS if label not in FIRST)]
    labels = [label for label in order if label in VARIANTS]
    clips = False, True
    if on.name == "cuda":
        yield from (Case(model, label, clip) for label in labels for model in ("gpt2", "small1000") for clip in clips)
        rest = (model for model in MODELS if model not in ("gpt2", "small1000"))
        yield from (Case(model, label, clip) for model in rest for label in labels for clip in clips)
        return
    yield from (Case(model, label, clip) for label in FIRST for model in (*SMALL, "resnet50") for clip in clips)
    yield from (Case(model, label, clip) for model, few in LARGE.items() for label in few for clip in clips)
    others = [label for label in labels if label not in FIRST]
    yield from (Case(model, label, clip) for label in others for model in (*SMALL, "resnet50") for clip in clips)
    yield from (Case(model, "AdamW", True, amp=True) for model in (*SMALL, "resnet50"))
    yield from (
        Case(model, label, clip) for model in LARGE for label in FIRST for clip in clips if label not in LARGE[model]
    )


def case_seconds(case: Case, on: Cpu) -> float:
    if on.name == "cuda":
        return 0.5
    return 5.0 if case.model in LARGE else 1.0


def line(row: Row) -> str:
    """One row of the table."""
    marks = " ".join([row.dtype, *(["clip"] if row.clip else []), *(["amp"] if row.amp else [])])
    start = f"{row.model:10} {row.optimizer:25} {marks:13} {row.implementation:17}"
    if row.status != "ok":
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
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--clip", action=argparse.BooleanOptionalAction, help="only with, or only without")
    parser.add_argument("--amp", action="store_true", help="with a GradScaler")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: a GPU where there is one")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU (default: %(default)s)")
    parser.add_argument("--seconds", type=float, help="per case, at least five rounds (default: by the case)")
    parser.add_argument("--minutes", type=float, default=12, help="after which no case is begun (default: %(default)s)")
    parser.add_argument("--save", action="store_true", help="append the rows to --out")
    parser.add_argument("--out", type=pathlib.Path, default=HISTORY, help="default: bench/history.csv")
    options = parser.parse_args()
    deadline = time.monotonic() + 60 * options.minutes
    on = device(options.device)
    torch.set_num_threads(options.threads)
    if options.models or options.optimizers or options.amp or options.dtype != "float32":
        models = options.models or [model for model in MODELS if on.name == "cuda" or model not in GPU_ONLY]
        cases: Iterable[Case] = (
            Case(model, label, clip, options.amp, options.dtype)
            for model in models for label in options.optimizers or VARIANTS for clip in (False, True)
        )  # fmt: skip
    else:
        cases = plan(on)
    cases = [case for case in cases if options.clip is None or case.clip == options.clip]
    print(HEADER)
    run(cases, options.implementations, on, options.seconds, deadline, options.out if options.save else None)


if __name__ == "__main__":
    main()
