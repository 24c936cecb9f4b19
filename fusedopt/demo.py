"""Train the lessons twice, with torch.optim and with fusedopt, and show what differs: nothing but the time of a step.

Both networks start from the same seed and see the same batches, in lockstep: on each batch first the one, then the
other makes its step, and they take turns in going first, so that whatever disturbs the machine disturbs both.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from torch import Tensor, nn
from tqdm import tqdm

import fusedopt
from fusedopt.lessons import Lesson

LEARNING_RATES = {"SGD": 0.1}  # the classifier's; every other optimizer keeps torch's own default
STYLES = {
    "torch.optim": {"color": "#e8a33d", "linestyle": "-", "linewidth": 3.5},
    "fusedopt": {"color": "#1f4e9c", "linestyle": "--", "linewidth": 1.5},
}


@dataclass
class Run:
    """One side of a comparison: a network, its optimizer, and what was recorded while it trained."""

    network: nn.Module
    optimizer: torch.optim.Optimizer
    losses: list[float] = field(default_factory=list)  # mean over the batches of each epoch
    seconds: list[float] = field(default_factory=list)  # wall time of each optimizer.step()
    scores: dict[str, float] = field(default_factory=dict)  # of each part, after the training

    def learn(self, lesson: Lesson, x: Tensor, y: Tensor) -> Tensor:
        """One update on the batch x (n, d), y (n,); returns the loss before it, 0-dim."""
        self.optimizer.zero_grad()
        loss = lesson.loss(self.network(x), y)
        loss.backward()
        synchronize(x.device)
        start = time.perf_counter()
        self.optimizer.step()
        synchronize(x.device)
        self.seconds.append(time.perf_counter() - start)
        return loss.detach()


@dataclass
class Comparison:
    """The same training by torch.optim and by fusedopt; ``runs`` is keyed by these two names."""

    lesson: Lesson
    optimizer: str
    runs: dict[str, Run]

    @property
    def difference(self) -> float:
        """max |theta_torch - theta_fusedopt| over all elements of all parameters; NaN if any of them is."""
        pairs = zip(*(run.network.parameters() for run in self.runs.values()))
        return torch.stack([(theirs - ours).detach().abs().max() for theirs, ours in pairs]).max().item()

    @property
    def speedup(self) -> float:
        """Median time of a torch.optim step over that of a fusedopt step."""
        theirs, ours = (median(run.seconds) for run in self.runs.values())
        return theirs / ours


def compare(
    lesson: Lesson, name: str, *, epochs: int, device: torch.device, seed: int = 0, lr: float | None = None
) -> Comparison:
    """Train ``lesson`` with ``torch.optim.<name>`` and ``fusedopt.<name>``; ``lr`` None is the optimizer's default."""
    settings = {} if lr is None else {"lr": lr}
    runs = {}
    for library, optimizer in (("torch.optim", getattr(torch.optim, name)), ("fusedopt", fusedopt.registry[name])):
        network = lesson.network(seed).to(device)
        runs[library] = Run(network, optimizer(network.parameters(), **settings))
    rate = runs["fusedopt"].optimizer.param_groups[0]["lr"]
    result = Comparison(lesson, f"{name} lr={rate:g}", runs)

    parts = {part: (x.to(device), y.to(device)) for part, (x, y) in lesson.parts.items()}
    shuffle = torch.Generator().manual_seed(seed)  # on the CPU: the same batches on every device
    progress = tqdm(range(epochs), desc=f"{lesson.name}, {result.optimizer}", unit="epoch")
    turn = list(runs.values())
    for _ in progress:
        losses = {id(run): [] for run in turn}
        for x, y in batches(*parts["train"], lesson.batch_size, shuffle):
            for run in turn:
                losses[id(run)].append(run.learn(lesson, x, y))
            turn.reverse()
        for run in turn:
            run.losses.append(torch.stack(losses[id(run)]).mean().item())
        progress.set_postfix_str(f"loss {runs['fusedopt'].losses[-1]:.4f}", refresh=False)

    for run in turn:
        with torch.no_grad():
            run.scores = {part: lesson.score(run.network(x), y).item() for part, (x, y) in parts.items()}
    return result


def batches(x: Tensor, y: Tensor, size: int | None, shuffle: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch: x (n, d) and y (n,) in random order, ``size`` rows at a time; None: everything at once, in order."""
    if size is None:
        yield x, y
        return
    for rows in torch.randperm(len(x), generator=shuffle).to(x.device).split(size):
        yield x[rows], y[rows]


@contextmanager
def cpu_threads(number: int) -> Iterator[None]:
    """Let torch use ``number`` CPU threads inside the block.

    Two threads make these trainings 1.3 times as fast on two free cores, and 20 times as slow where another program
    holds one of them: every parallel region then waits for the thread that does not run.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def synchronize(device: torch.device) -> None:
    """Wait for the device, so that a step's time holds the work of that step and of nothing else."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def table(comparisons: list[Comparison]) -> str:
    """Two lines per training, torch.optim above fusedopt; plain ASCII, so that any terminal or pipe can take it."""
    rows = [
        ("training", "optimizer", "library", "measure", "train", "validation", "test", "step", "ratio", "difference")
    ]
    for result in comparisons:
        for library, run in result.runs.items():
            ours = library == "fusedopt"
            rows.append(
                (
                    "" if ours else result.lesson.name,
                    "" if ours else result.optimizer,
                    library,
                    result.lesson.score_name,
                    *(format(score, result.lesson.score_format) for score in run.scores.values()),
                    f"{median(run.seconds) * 1e6:.1f} us",
                    f"{result.speedup:.2f}x" if ours else "",
                    f"{result.difference:.1e}" if ours else "",
                )
            )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    words = 4  # columns of words stand left, columns of numbers right
    lines = [
        "  ".join(
            cell.ljust(width) if column < words else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths))
        ).rstrip()
        for row in rows
    ]
    lines.insert(1, "-" * max(map(len, lines)))
    return "\n".join(lines)


def plot(comparisons: list[Comparison], title: str, path: Path) -> None:
    """Save a PNG with one column per training: the loss curves above, the distribution of the step times below."""
    figure = Figure(figsize=(4.6 * len(comparisons), 7), layout="constrained")
    panels = figure.subplots(2, len(comparisons), squeeze=False)
    for result, (curves, times) in zip(comparisons, panels.T):
        draw_losses(result, curves)
        draw_times(result, times)
    figure.suptitle(title)
    figure.savefig(path, format="png", dpi=150)


def draw_losses(result: Comparison, axes: Axes) -> None:
    """Training loss by epoch, logarithmic: fusedopt's dashes lie on torch's line where the two agree."""
    for library, run in result.runs.items():
        axes.plot(range(1, len(run.losses) + 1), run.losses, label=library, **STYLES[library])
    axes.set(title=f"{result.lesson.name}, {result.optimizer}", xlabel="epoch", ylabel=result.lesson.loss_name)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")  # 0.2 rather than 2 × 10⁻¹
    axes.yaxis.set_minor_formatter(NullFormatter())
    finish(axes)


def draw_times(result: Comparison, axes: Axes) -> None:
    """Histogram of the step times up to their 99th percentile, with both medians."""
    micros = {library: torch.tensor(run.seconds, dtype=torch.float64) * 1e6 for library, run in result.runs.items()}
    # The slowest steps (the first builds the state, the system interrupts others) would squeeze the rest to a line.
    longest = max(times.quantile(0.99).item() for times in micros.values())
    for library, times in micros.items():
        middle, color = times.median().item(), STYLES[library]["color"]
        label = f"{library}, median {middle:.0f} µs"
        axes.hist(times.tolist(), bins=80, range=(0, longest), color=color, alpha=0.6, label=label)
        axes.axvline(middle, color=color, linestyle=STYLES[library]["linestyle"])
    axes.set(title=f"torch / fusedopt = {result.speedup:.2f}", xlabel="time of optimizer.step() (µs)", ylabel="steps")
    axes.set_ylim(top=1.35 * axes.get_ylim()[1])  # room for the legend above the bars
    finish(axes)


def finish(axes: Axes) -> None:
    """Light grid, no box, legend in the upper right corner."""
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper right", framealpha=1)
