"""How well networks train with parameters and states in each form, on a CPU, against float32.

    python bench/convergence.py [--save]    trains all, and makes a table, bench/convergence.csv and the plot of it

``char-gpt`` predicts the next character of the documentation that ships inside Python, its learning rate falling along
a cosine; ``digits`` tells handwritten digits apart at a small constant one, by which most updates are smaller than half
a step of a bfloat16. Forward and backward are computed in float32 from the stored parameters, and gradients have the
parameters' dtype: what differs between runs of one seed is how parameters and states are stored.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import math
import pathlib
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from history import write
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from train import CharGPT, Sizes, sentences

import fusedopt
from fusedopt import lessons
from fusedopt.__main__ import amount

RUNS = pathlib.Path(__file__).with_name("convergence.csv")
PLOTS = RUNS.with_name("plots")
SEEDS = 5
POINTS = 40
"""Of each curve."""


class Form(NamedTuple):
    param: torch.dtype
    master: str | None = None
    state_dtype: Any = torch.float32


NARROW, WIDE = torch.bfloat16, torch.float32

FORMS = {
    "float32": Form(WIDE),
    "nearest": Form(NARROW),
    "stochastic": Form(NARROW, "stochastic"),
    "kahan": Form(NARROW, "kahan"),
    "split8": Form(NARROW, "split8"),
    "split": Form(NARROW, "split"),
    "fp32": Form(NARROW, "fp32"),
    "float32 + bfloat16 states": Form(WIDE, None, NARROW),
    "float32 + 8-bit states": Form(WIDE, None, "8bit"),
    "stochastic + bfloat16 states": Form(NARROW, "stochastic", NARROW),
    "split8 + 8-bit states": Form(NARROW, "split8", "8bit"),
    "nearest + bfloat16 states": Form(NARROW, None, None),
}
"""The first is what the others are compared with. In the last states are rounded to the nearest too: what torch.optim
does with bfloat16 parameters."""


class Task(NamedTuple):
    build: Callable[[], nn.Module]
    batches: Callable[[int], Iterator[tuple[Tensor, Tensor]]]
    """By seed."""
    unseen: Callable[[], tuple[Tensor, Tensor]]
    """What the loss is measured on at the end."""
    lr: Callable[[int, int], float]
    """At a step of so many."""
    steps: int


GPT = Sizes(width=64, depth=2, batch=8, length=32)
CPU = torch.device("cpu")


def text(seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    return sentences(GPT, CPU, seed)


def unseen_text() -> tuple[Tensor, Tensor]:
    """Windows of the same text that hardly any batch began with."""
    return next(sentences(GPT._replace(batch=256), CPU, 10**6))


def digits(seed: int, batch: int = 64) -> Iterator[tuple[Tensor, Tensor]]:
    x, y = lessons.classification().parts["train"]
    generator = torch.Generator().manual_seed(seed)
    while True:
        picked = torch.randint(len(x), (batch,), generator=generator)
        yield x[picked], y[picked]


def unseen_digits() -> tuple[Tensor, Tensor]:
    return lessons.classification().parts["validation"]


TASKS = {
    "char-gpt": Task(
        lambda: CharGPT(GPT), text, unseen_text, lambda t, steps: 2e-3 * (1 + math.cos(math.pi * t / steps)) / 2, 400
    ),
    "digits": Task(
        lambda: nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 10)),
        digits, unseen_digits, lambda t, steps: 1e-4, 400,
    ),
}  # fmt: skip


@dataclasses.dataclass
class Run:
    """One training."""

    date: str
    torch: str
    task: str
    form: str
    seed: int
    steps: int
    loss: float
    """On unseen data, at the end."""
    curve: str
    """The training loss, as means over equal parts of the steps."""


def train(task: Task, form: Form, seed: int, steps: int) -> tuple[list[float], float]:
    """(training loss at each step, loss on unseen data at the end)"""
    torch.manual_seed(seed)
    network = task.build()
    stored = {name: nn.Parameter(p.detach().to(form.param)) for name, p in network.named_parameters()}
    optimizer = fusedopt.AdamW(
        stored.values(), lr=0.0, max_grad_norm=1.0, master=form.master, state_dtype=form.state_dtype, seed=seed,
        backend="torch",
    )  # fmt: skip
    batches = task.batches(seed)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        output = functional_call(network, {name: p.float() for name, p in stored.items()}, (x,))
        return F.cross_entropy(output.flatten(0, -2), y.flatten())

    losses = []
    for t in range(steps):
        optimizer.param_groups[0]["lr"] = task.lr(t, steps)
        value = loss(*next(batches))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    with torch.no_grad():
        return losses, loss(*task.unseen()).item()


def run(tasks: list[str], forms: list[str], seeds: int, steps: int | None = None) -> Iterator[Run]:
    """Every training; ``steps`` instead of the task's own."""
    date = time.strftime("%Y-%m-%d")
    for name in tasks:
        task = TASKS[name]
        count = steps or task.steps
        size = max(1, count // POINTS)
        for form in forms:
            for seed in range(seeds):
                losses, loss = train(task, FORMS[form], seed, count)
                curve = " ".join(f"{statistics.fmean(losses[i : i + size]):.4f}" for i in range(0, count, size))
                yield Run(date, torch.__version__, name, form, seed, count, round(loss, 6), curve)


class Comparison(NamedTuple):
    """One form's losses at the end beside those of float32."""

    mean: float
    low: float
    high: float
    paired: float
    """The mean difference from float32's run of the same seed."""
    error: float
    """The standard error of that."""
    within: bool
    """Whether the mean lies between the smallest and the largest loss of float32's seeds."""


def compare(runs: list[Run], task: str, form: str) -> Comparison:
    found, reference = (
        {run.seed: run.loss for run in runs if run.task == task and run.form == each} for each in (form, "float32")
    )
    losses = list(found.values())
    differences = [loss - reference[seed] for seed, loss in found.items()]
    mean = statistics.fmean(losses)
    error = statistics.stdev(differences) / len(differences) ** 0.5 if len(differences) > 1 else math.nan
    within = min(reference.values()) <= mean <= max(reference.values())
    return Comparison(mean, min(losses), max(losses), statistics.fmean(differences), error, within)


def table(runs: list[Run]) -> str:
    """Markdown."""
    lines = []
    for task in dict.fromkeys(run.task for run in runs):
        chosen = [run for run in runs if run.task == task]
        count = len({run.seed for run in chosen})
        lines += [
            f"`{task}`, {chosen[0].steps} steps, {count} seeds; torch {chosen[0].torch}, {chosen[0].date}:", "",
            "| form | loss: mean (smallest, largest) | minus float32 of the same seed | within float32's spread |",
            "|---|---|---|---|",
        ]  # fmt: skip
        for form in dict.fromkeys(run.form for run in chosen):
            found = compare(runs, task, form)
            minus = "–" if form == "float32" else f"{found.paired:+.4f} ± {found.error:.4f}"
            verdict = "–" if form == "float32" else "yes" if found.within else "**no**"
            lines.append(f"| {form} | {found.mean:.4f} ({found.low:.4f}, {found.high:.4f}) | {minus} | {verdict} |")
        lines.append("")
    return "\n".join(lines)


def draw(runs: list[Run], folder: pathlib.Path = PLOTS) -> None:
    """Above, each task's training loss; below, what every form's is above float32's run of the same seed. Lines are
    means over the seeds, bands what lies between float32's smallest and largest."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    tasks = list(dict.fromkeys(run.task for run in runs))
    figure, axes = plt.subplots(2, len(tasks), figsize=(6 * len(tasks), 8), squeeze=False)
    for (above, below), task in zip(axes.T, tasks):
        curves: dict[str, list[list[float]]] = {}
        for made in runs:
            if made.task == task:
                curves.setdefault(made.form, []).append([float(x) for x in made.curve.split()])
        steps = next(made.steps for made in runs if made.task == task)
        x = [steps * (i + 0.5) / len(curves["float32"][0]) for i in range(len(curves["float32"][0]))]
        middle = [statistics.fmean(losses) for losses in zip(*curves["float32"])]
        low, high = ([limit(losses) for losses in zip(*curves["float32"])] for limit in (min, max))
        above.fill_between(x, low, high, color="0.85", label="float32, all seeds")
        below.fill_between(x, [a - b for a, b in zip(low, middle)], [a - b for a, b in zip(high, middle)], color="0.85")
        for number, (form, found) in enumerate(curves.items()):
            style = {"color": f"C{number % 10}", "linestyle": ("-", "--", ":")[number % 3], "linewidth": 1.5}
            mean = [statistics.fmean(losses) for losses in zip(*found)]
            above.plot(x, mean, label=form, **style)
            below.plot(x, [a - b for a, b in zip(mean, middle)], **style)
        above.set(title=f"{task}: AdamW, {len(curves['float32'])} seeds", ylabel="training loss")
        below.set(xlabel="step", ylabel="above float32's mean")
        spread = max(b - a for a, b in zip(low, high))
        below.set_ylim(-1.2 * spread, 2 * spread)
    axes[0][0].legend(fontsize=7)
    figure.suptitle(f"torch {runs[0].torch}, {runs[0].date}", fontsize=8)
    folder.mkdir(parents=True, exist_ok=True)
    for kind in ("svg", "png"):
        # Without dates and random names, equal rows make equal files.
        with matplotlib.rc_context({"svg.hashsalt": "convergence"}):
            metadata = {"Date": None} if kind == "svg" else {}
            figure.savefig(folder / f"convergence.{kind}", metadata=metadata, dpi=110, bbox_inches="tight")
    plt.close(figure)


def read(path: pathlib.Path = RUNS) -> list[Run]:
    with path.open(newline="") as file:
        return [
            Run(**{**line, "seed": int(line["seed"]), "steps": int(line["steps"]), "loss": float(line["loss"])})
            for line in csv.DictReader(file)
        ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS), metavar="FORM")
    parser.add_argument("--seeds", type=amount, default=SEEDS, help="default: %(default)s")
    parser.add_argument("--save", action="store_true", help="write bench/convergence.csv and its plot")
    options = parser.parse_args()
    torch.set_num_threads(1)
    runs = []
    for made in run(options.tasks, options.forms, options.seeds):
        runs.append(made)
        print(f"{made.task:9} {made.form:30} seed {made.seed}: {made.loss:.4f}", flush=True)
    print(table(runs))
    if options.save:
        write(runs, Run, RUNS)
        draw(runs)


if __name__ == "__main__":
    main()
