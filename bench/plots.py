"""Plots of the rows of whole steps, one folder of SVG and PNG. Each says where, with what and when it was measured."""

from __future__ import annotations

import pathlib
from collections.abc import Callable

import matplotlib

matplotlib.use("agg")

from history import Row
from matplotlib import pyplot as plt
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


def draw(rows: list[Row], folder: pathlib.Path) -> list[pathlib.Path]:
    """Every plot that has data, per machine. Old files are overwritten, so that a plot always has its rows."""
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for number, (machine, found) in enumerate(machines(rows).items(), 1):
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
    """Bars of the wall time of one AdamW step, by model and implementation, without and with clipping."""
    return _bars(
        [row for row in rows if row.optimizer == "AdamW"],
        lambda row: row.wall_us,
        "AdamW: µs per step, log scale",
        log=True,
    )


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
    """Host time of one AdamW step against the number of tensors. (On a CPU the host's time is the wall time.)"""
    found = [row for row in rows if row.optimizer == "AdamW" and row.host_us is not None]
    if not found:
        return None
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.5), sharey=True)
    for ax, clip in zip(axes, (False, True)):
        for name in dict.fromkeys(row.implementation for row in found):
            points = sorted(
                (row.tensors, row.host_us) for row in found if row.implementation == name and row.clip == clip
            )
            if points:
                ax.plot(*zip(*points), marker="o", label=name, color=COLORS.get(name, OTHER))
        ax.set(xscale="log", yscale="log", xlabel="tensors", title=_title(clip))
    axes[0].set_ylabel("host µs per AdamW step")
    axes[0].legend(fontsize=7)
    return figure


def memory(rows: list[Row]) -> plt.Figure | None:
    """Peak above parameters and gradients, per element, by optimizer."""
    found = [row for row in rows if row.memory_bytes is not None]
    model = next((m for m in ("gpt2", "resnet50", "mlp") if any(row.model == m for row in found)), None)
    if model is None:
        return None
    return _bars(
        [row for row in found if row.model == model], lambda row: row.memory_bytes / row.elements,
        "bytes per element above parameters and gradients", by=lambda row: row.optimizer, title=TITLES[model],
    )  # fmt: skip


def _bars(
    rows: list[Row],
    value: Callable[[Row], float | None],
    label: str,
    by: Callable[[Row], str] = lambda row: TITLES.get(row.model, row.model),
    log: bool = False,
    title: str = "",
) -> plt.Figure | None:
    rows = [row for row in rows if value(row) is not None]
    if not rows:
        return None
    kinds = list(dict.fromkeys(map(by, rows)))
    names = [name for name in COLORS if any(row.implementation == name for row in rows)]
    names += sorted({row.implementation for row in rows} - set(names))
    figure, axes = plt.subplots(2, 1, figsize=(max(6, 1.2 * len(kinds)), 6), sharex=True, sharey=True)
    width = 0.8 / len(names)
    for ax, clip in zip(axes, (False, True)):
        for number, name in enumerate(names):
            at = {by(row): value(row) for row in rows if row.implementation == name and row.clip == clip}
            places = [kinds.index(kind) + width * (number - (len(names) - 1) / 2) for kind in at]
            ax.bar(places, at.values(), width, label=name, color=COLORS.get(name, OTHER))
        ax.set_title(f"{title}{', ' * bool(title)}{_title(clip)}", fontsize=9)
        ax.set_ylabel(label, fontsize=8)
        ax.set_xticks(range(len(kinds)), kinds, rotation=30, ha="right", fontsize=8)
        if log:
            ax.set_yscale("log")
    axes[0].legend(fontsize=7, ncols=3)
    return figure


def _title(clip: bool) -> str:
    return "with clipping" if clip else "without clipping"


PLOTS = {"step_time": step_time, "bandwidth": bandwidth, "host_time": host_time, "memory": memory}
