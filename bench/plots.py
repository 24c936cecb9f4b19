"""Plots of steps and of the host's part of them, one folder of SVG and PNG. Each says where, with what and when it was
measured."""

from __future__ import annotations

import pathlib
from collections.abc import Callable

import matplotlib

matplotlib.use("agg")

from history import Row, latest
from matplotlib import pyplot as plt
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter
from report import machines, origin
from shapes import TITLES

COLORS = {
    "fusedopt": "#d1495b",
    "fusedopt flatten": "#edae49",
    "fusedopt 8-bit": "#f2d0a4",
    "fused": "#00798c",
    "foreach": "#30638e",
    "forloop": "#8d96a3",
    "compiled": "#003d5b",
}
OTHER = "#b8b8b8"

PARTS = "step", "host"
"""Parts of the history that are drawn: on a CPU the host's time is a measurement of its own."""


def draw(rows: list[Row], folder: pathlib.Path) -> list[pathlib.Path]:
    """Every plot that has data, per machine. Old files are overwritten, so that a plot always has its rows."""
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    drawn = [row for row in latest(rows) if row.part in PARTS]
    for number, (machine, found) in enumerate(machines(drawn).items(), 1):
        plain = [row for row in found if row.status == "ok" and row.dtype == "float32" and not row.amp]
        for name, plot in PLOTS.items():
            figure = plot(plain)
            if figure is None:
                continue
            figure.suptitle(f"{machine}; {origin(plain)}", fontsize=8)
            for kind in ("svg", "png"):
                made.append(folder / f"{name}-{number}.{kind}")
                # Without dates and random names, equal rows make equal files.
                metadata = {"Date": None} if kind == "svg" else {}
                with matplotlib.rc_context({"svg.hashsalt": name}):
                    figure.savefig(made[-1], metadata=metadata, dpi=120, bbox_inches="tight")
            plt.close(figure)
    return made


def step_time(rows: list[Row]) -> plt.Figure | None:
    """Bars of the wall time of one AdamW step by implementation, without and with clipping: one panel per model."""
    found = [row for row in rows if row.optimizer == "AdamW" and row.wall_us is not None]
    models = [model for model in TITLES if any(row.model == model for row in found)]
    if not models:
        return None
    across = min(3, len(models))
    down = -(-len(models) // across)
    figure, axes = plt.subplots(down, across, figsize=(3.2 * across, 2.4 * down), squeeze=False, layout="constrained")
    for ax in axes.flat[len(models) :]:
        ax.set_axis_off()
    names = _names(found)
    for ax, model in zip(axes.flat, models):
        _grouped(
            ax, [row for row in found if row.model == model], lambda row: row.wall_us / 1e3,
            by=lambda row: _title(row.clip), kinds=[_title(False), _title(True)], names=names,
        )  # fmt: skip
        ax.set_title(TITLES[model], fontsize=9)
    for ax in axes[:, 0]:
        ax.set_ylabel("ms per AdamW step", fontsize=8)
    _legend(figure)
    return figure


def bandwidth(rows: list[Row]) -> plt.Figure | None:
    """Useful bytes per second as a part of a copy's, for models that do not fit into caches."""
    large = [row for row in rows if row.model in ("gpt2", "llama1b", "one50m") and row.implementation != "forloop"]
    names = list(dict.fromkeys(row.optimizer for row in large if row.bandwidth is not None))
    if not names:
        return None
    figure = _bars(
        [row for row in large if row.model == large[0].model], lambda row: row.bandwidth, "of the copy bandwidth",
        by=lambda row: row.optimizer, title=TITLES[large[0].model],
    )  # fmt: skip
    for axes in figure.axes:
        axes.axhline(1.0, color="black", linewidth=0.8, linestyle="--")
    return figure


def host_time(rows: list[Row]) -> plt.Figure | None:
    """Host time of one AdamW step against the number of tensors."""
    others = "groups", "DTensors"
    found = [row for row in rows if row.optimizer == "AdamW" and row.host_us is not None]
    found = [row for row in found if not any(kind in row.model for kind in others)]
    if not found:
        return None
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.5), sharey=True, layout="constrained")
    for ax, clip in zip(axes, (False, True)):
        for name in _names(found):
            points = sorted(
                (row.tensors, row.host_us) for row in found if row.implementation == name and row.clip == clip
            )
            if points:
                ax.plot(*zip(*points), marker="o", markersize=3, label=name, color=COLORS.get(name, OTHER))
        ax.set(xscale="log", yscale="log")
        ax.set_xlabel("tensors", fontsize=8)
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_major_locator(LogLocator(subs=(1, 3)))
            axis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
            axis.set_minor_formatter(NullFormatter())
        ax.set_title(_title(clip), fontsize=9)
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("host µs per AdamW step", fontsize=8)
    _legend(figure)
    return figure


def memory(rows: list[Row]) -> plt.Figure | None:
    """Peak above parameters and gradients, per element, by optimizer."""
    found = [row for row in rows if row.memory_bytes is not None]
    model = next((m for m in ("gpt2", "resnet50", "mlp") if any(row.model == m for row in found)), None)
    if model is None:
        return None
    return _bars(
        [row for row in found if row.model == model], lambda row: row.memory_bytes / row.elements,
        "bytes per element beside\nparameters and gradients", by=lambda row: row.optimizer, title=TITLES[model],
    )  # fmt: skip


def _bars(
    rows: list[Row], value: Callable[[Row], float | None], label: str, by: Callable[[Row], str], title: str
) -> plt.Figure:
    """Bars of ``value`` by implementation for each kind ``by`` of row: above without clipping, below with it."""
    rows = [row for row in rows if value(row) is not None]
    kinds = list(dict.fromkeys(map(by, rows)))
    size = max(6, 1.2 * len(kinds)), 6
    figure, axes = plt.subplots(2, 1, figsize=size, sharex=True, sharey=True, layout="constrained")
    for ax, clip in zip(axes, (False, True)):
        _grouped(ax, [row for row in rows if row.clip == clip], value, by, kinds, _names(rows))
        ax.set_title(f"{title}, {_title(clip)}", fontsize=9)
        ax.set_ylabel(label, fontsize=8)
    _legend(figure)
    return figure


def _grouped(
    ax: plt.Axes, rows: list[Row], value: Callable[[Row], float], by: Callable[[Row], str], kinds: list[str],
    names: list[str],
) -> None:  # fmt: skip
    """A group of bars for each kind, in it one for each implementation."""
    width = 0.8 / len(names)
    for number, name in enumerate(names):
        at = {by(row): value(row) for row in rows if row.implementation == name}
        places = [kinds.index(kind) + width * (number - (len(names) - 1) / 2) for kind in at]
        ax.bar(places, at.values(), width, label=name, color=COLORS.get(name, OTHER))
    turned = {"rotation": 30, "ha": "right"} if len(kinds) > 4 else {}
    ax.set_xticks(range(len(kinds)), kinds, fontsize=8, **turned)
    ax.tick_params(axis="y", labelsize=8)


def _names(rows: list[Row]) -> list[str]:
    """The implementations in an order that is the same everywhere."""
    there = {row.implementation for row in rows}
    return [*(name for name in COLORS if name in there), *sorted(there - COLORS.keys())]


def _legend(figure: plt.Figure) -> None:
    """One for all panels, below them."""
    labelled = {label: handle for ax in figure.axes for handle, label in zip(*ax.get_legend_handles_labels())}
    figure.legend(labelled.values(), labelled.keys(), fontsize=8, ncols=6, loc="outside lower center")


def _title(clip: bool) -> str:
    return "with clipping" if clip else "without clipping"


PLOTS = {"step_time": step_time, "bandwidth": bandwidth, "host_time": host_time, "memory": memory}
