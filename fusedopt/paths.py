"""``python -m fusedopt paths``: the way of every textbook rule over a quadratic and over a saddle, as one picture.

quadratic   f(x) = 0.1 x1^2 + 2 x2^2: twenty times as steep in one direction as in the other
saddle      f(x) = x1^2 - x2^2 + x2^4 / 2: level at 0, two valleys beyond it
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure, FigureBase
from torch import Tensor

import fusedopt


class Surface(NamedTuple):
    """A function of x (2,), where the paths on it begin, and the part of the plane that is drawn."""

    name: str
    formula: str
    value: Callable[[Tensor], Tensor]
    start: tuple[float, float]
    box: tuple[float, float, float, float]
    """Left, right, bottom, top."""
    goals: tuple[tuple[float, float], ...]


SURFACES = {
    "quadratic": Surface(
        "quadratic",
        "0.1 x₁² + 2 x₂²",
        lambda x: 0.1 * x[0] ** 2 + 2 * x[1] ** 2,
        start=(-5.0, -2.0),
        box=(-5.8, 2.6, -2.6, 2.6),
        goals=((0.0, 0.0),),
    ),
    "saddle": Surface(
        "saddle",
        "x₁² − x₂² + x₂⁴ / 2",
        lambda x: x[0] ** 2 - x[1] ** 2 + x[1] ** 4 / 2,
        start=(-1.6, 0.02),
        box=(-1.9, 1.7, -0.7, 1.5),
        goals=((0.0, 1.0), (0.0, -1.0)),
    ),
}


class Rule(NamedTuple):
    """A row of the table of formulas, and the learning rates at which its path is worth looking at."""

    label: str
    optimizer: str
    options: Mapping[str, Any]
    rates: Mapping[str, float]


GENTLE = {"quadratic": 0.4, "saddle": 0.1}
CAREFUL = {"quadratic": 0.2, "saddle": 0.1}
INSIDE = {"eps": 0.1, "eps_inside_sqrt": True}
BETAS = {"betas": (0.8, 0.9)}


def momentum(**options: Any) -> dict[str, Any]:
    return {"momentum": 0.7, **options}


FAMILIES: dict[str, list[Rule]] = {
    "Momentum": [
        Rule("F1 gradient descent", "SGD", {}, GENTLE),
        Rule("F2 momentum, accumulated", "SGD", momentum(), GENTLE),
        Rule("F3 velocity (F2 while η is constant)", "SGD", momentum(momentum_form="velocity"), GENTLE),
        Rule("F4 averaged", "SGD", momentum(momentum_form="average"), GENTLE),
    ],
    "Nesterov": [
        Rule("F5 accumulated, looking ahead", "SGD", momentum(nesterov=True), CAREFUL),
        Rule("F5 velocity", "SGD", momentum(nesterov=True, momentum_form="velocity"), CAREFUL),
        Rule("F5 averaged", "SGD", momentum(nesterov=True, momentum_form="average"), CAREFUL),
    ],
    "AdaGrad": [
        Rule("F6 AdaGrad, √(G + ε), ε = 0.1", "Adagrad", INSIDE, {"quadratic": 2.0, "saddle": 0.3}),
        Rule("F7 torch's, √G + ε, ε = 0.1", "Adagrad", {"eps": 0.1}, {"quadratic": 2.0, "saddle": 0.3}),
    ],
    "RMSProp": [
        Rule("F8 RMSProp, √(s + ε), ε = 0.1", "RMSprop", {"alpha": 0.9, **INSIDE}, GENTLE),
        Rule("F9 torch's, √s + ε, ε = 0.1", "RMSprop", {"alpha": 0.9, "eps": 0.1}, GENTLE),
        Rule("F10 without ε", "RMSprop", {"alpha": 0.9, "eps": 0}, GENTLE),
    ],
    "Adam": [
        Rule("F11 without correction", "Adam", {**BETAS, **INSIDE, "bias_correction": False}, GENTLE),
        Rule("F12 Adam", "Adam", BETAS, GENTLE),
        Rule("F13 L2 decay, λ = 0.3", "Adam", {**BETAS, "weight_decay": 0.3}, GENTLE),
        Rule("F13 AdamW, λ = 0.3", "AdamW", {**BETAS, "weight_decay": 0.3}, GENTLE),
    ],
}
"""The textbook's formulas, F1 to F13, as ``docs/rosetta.md`` numbers them."""

OWN_PATHS = {
    "SGD": Rule("SGD, μ = 0.5", "SGD", {"momentum": 0.5}, GENTLE),
    "Adagrad": Rule("Adagrad", "Adagrad", {}, {"quadratic": 2.0, "saddle": 0.3}),
    "RMSprop": Rule("RMSprop", "RMSprop", {"alpha": 0.9}, GENTLE),
    "Adam": Rule("Adam", "Adam", BETAS, GENTLE),
    "Lion": Rule("Lion", "Lion", {}, {"quadratic": 0.13, "saddle": 0.1}),
    "AdamW": Rule("AdamW", "AdamW", {**BETAS, "weight_decay": 0.1}, GENTLE),
}
"""One path for each registered optimizer, for its page in the documentation."""

COLORS = ("#e8a33d", "#3b7dd8", "#2fa05a", "#d04a7a")
WIDTHS = (3.4, 1.6, 1.6, 1.6)
DASHES = ("-", "-", "--", "-")


def path(name: str, surface: Surface, steps: int, **options: Any) -> Tensor:
    """The points x_0 ... x_steps, float64 (steps + 1, 2), of ``fusedopt.<name>`` with these options."""
    x = torch.nn.Parameter(torch.tensor(surface.start, dtype=torch.float64))
    optimizer = fusedopt.registry[name]([x], **options)
    points = [x.detach().clone()]
    for _ in range(steps):
        optimizer.zero_grad()
        surface.value(x).backward()
        optimizer.step()
        points.append(x.detach().clone())
    return torch.stack(points)


def picture(file: Path, steps: int = 40) -> None:
    """Save a PNG with a row per family of rules and a column per surface."""
    figure = Figure(figsize=(11, 3.3 * len(FAMILIES)), layout="constrained")
    for (family, rules), row in zip(FAMILIES.items(), figure.subfigures(len(FAMILIES), 1)):
        draw_family(row, family, rules, steps)
    figure.suptitle(f"{steps} steps of each rule by fusedopt; a dot per step, a cross at each minimum")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, format="png", dpi=130)


def draw_family(figure: FigureBase, family: str, rules: Sequence[Rule], steps: int = 40) -> None:
    """The paths of some rules, a panel per surface."""
    for surface, axes in zip(SURFACES.values(), figure.subplots(1, len(SURFACES))):
        landscape(axes, surface)
        for k, rule in enumerate(rules):
            points = path(rule.optimizer, surface, steps, lr=rule.rates[surface.name], **rule.options)
            draw(axes, points, rule.label, k if len(rules) > 1 else 1)
        axes.set_title(f"{family} on {surface.formula}, η = {rules[0].rates[surface.name]:g}", fontsize=10)
        if len(rules) > 1:
            axes.legend(loc="lower right", fontsize=7, framealpha=0.9)


def landscape(axes: Axes, surface: Surface) -> None:
    """Contour lines, the minima and the start."""
    left, right, bottom, top = surface.box
    x1, x2 = torch.meshgrid(torch.linspace(left, right, 200), torch.linspace(bottom, top, 200), indexing="xy")
    values = surface.value(torch.stack([x1, x2]))
    # Denser towards the lowest point, where the surface is flat.
    levels = values.min() + (values.max() - values.min()) * torch.linspace(0, 1, 16) ** 2
    axes.contour(x1, x2, values, levels=levels.tolist(), colors="0.6", alpha=0.5, linewidths=0.7)
    for goal in surface.goals:
        axes.plot(*goal, "x", color="0.5", markersize=7)
    axes.plot(*surface.start, "s", color="0.5", markersize=5)
    axes.set(xlim=(left, right), ylim=(bottom, top), xlabel="x₁", ylabel="x₂")


def draw(axes: Axes, points: Tensor, label: str, k: int) -> None:
    """The ``k``-th path of a panel; where two coincide, both can be seen."""
    style = {"color": COLORS[k], "linewidth": WIDTHS[k], "linestyle": DASHES[k]}
    axes.plot(*points.T.tolist(), label=label, marker="o", markersize=2, **style)
