"""The picture of the demo: loss, learning rate, gradient norm and step time of every training, side by side."""

from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from fusedopt.demo import Comparison

STYLES = {
    "torch.optim": {"color": "#e8a33d", "linestyle": "-", "linewidth": 3.5},
    "fusedopt": {"color": "#1f4e9c", "linestyle": "--", "linewidth": 1.5},
}


def plot(comparisons: list[Comparison], title: str, path: Path) -> None:
    """Save a PNG with one column per training."""
    drawings = (draw_losses, draw_rates, draw_norms, draw_times)
    figure = Figure(figsize=(4.6 * len(comparisons), 3.2 * len(drawings)), layout="constrained")
    panels = figure.subplots(len(drawings), len(comparisons), squeeze=False)
    for result, column in zip(comparisons, panels.T):
        for draw, axes in zip(drawings, column):
            draw(result, axes)
    figure.suptitle(title)
    figure.savefig(path, format="png", dpi=150)


def draw_losses(result: Comparison, axes: Axes) -> None:
    """Training loss by epoch, logarithmic: fusedopt's dashes lie on torch's line where the two agree."""
    for library, run in result.runs.items():
        axes.plot(range(1, len(run.losses) + 1), run.losses, label=library, **STYLES[library])
    axes.set(title=f"{result.lesson.name}, {result.optimizer}", xlabel="epoch", ylabel=result.lesson.loss_name)
    logarithmic(axes, [loss for run in result.runs.values() for loss in run.losses])
    finish(axes)


def draw_rates(result: Comparison, axes: Axes) -> None:
    """The learning rate of every step."""
    for library, run in result.runs.items():
        axes.plot(range(1, len(run.rates) + 1), run.rates, label=library, **STYLES[library])
    axes.set(xlabel="step", ylabel="learning rate")
    axes.set_ylim(bottom=0, top=1.35 * axes.get_ylim()[1])
    finish(axes)


def draw_norms(result: Comparison, axes: Axes) -> None:
    """The norm over all gradients at every step, before clipping, and after it where there was any."""
    norms = {library: torch.stack(run.norms).tolist() for library, run in result.runs.items()}
    steps = range(1, len(norms["fusedopt"]) + 1)
    for library, values in norms.items():
        axes.plot(steps, values, label=f"{library}, before clipping", **STYLES[library] | {"linewidth": 1})
    if result.runs["fusedopt"].clip is not None:
        after = result.runs["fusedopt"].clipped_norms()
        axes.plot(steps, after, label="after clipping", color="#2a8a4a", linewidth=1)
    axes.set(xlabel="step", ylabel="gradient norm")
    logarithmic(axes, [norm for values in norms.values() for norm in values])
    bottom, top = axes.get_ylim()
    axes.set_ylim(bottom, top * (top / bottom) ** 0.5 if bottom > 0 else 1.5 * top)  # room for the legend
    finish(axes)


def logarithmic(axes: Axes, values: list[float]) -> None:
    """A logarithmic axis, unless a zero stands in its way."""
    if any(value == 0 for value in values):
        return
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")  # 0.2 rather than 2 × 10⁻¹
    axes.yaxis.set_minor_formatter(NullFormatter())


def draw_times(result: Comparison, axes: Axes) -> None:
    """Histogram of the step times with both medians, without the slowest."""
    micros = {library: torch.tensor(run.seconds, dtype=torch.float64) * 1e6 for library, run in result.runs.items()}
    # The first step builds the state, and the system interrupts others: they would squeeze the rest to a line.
    longest = max(min(times.quantile(0.99).item(), 5 * times.median().item()) for times in micros.values())
    for library, times in micros.items():
        middle, color = times.median().item(), STYLES[library]["color"]
        label = f"{library}, median {middle:.0f} µs"
        axes.hist(times.tolist(), bins=80, range=(0, longest), color=color, alpha=0.6, label=label)
        axes.axvline(middle, color=color, linestyle=STYLES[library]["linestyle"])
    axes.set(title=f"torch / fusedopt = {result.speedup:.2f}", xlabel="time of a step (µs)", ylabel="steps")
    axes.set_ylim(top=1.35 * axes.get_ylim()[1])  # room for the legend above the bars
    finish(axes)


def finish(axes: Axes) -> None:
    """Light grid, no box, legend in the upper right corner."""
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper right", framealpha=1)
