"""``python -m fusedopt``: tiny runs end to end, and pictures of paths."""

import re
from copy import deepcopy

import numpy as np
import pytest
import torch
from demo_runs import (
    CLOSE,
    DEVICE,
    TORCH_NAMES,
    one_thread,  # noqa: F401, used by itself
    run,
    table,
)
from PIL import Image

import fusedopt
from fusedopt import demo, lessons, paths
from fusedopt.__main__ import main
from fusedopt.demo_options import SCHEDULES, criterion


def test_default_trainings_agree(tmp_path, capsys):
    printed = run(tmp_path, capsys)
    backend = fusedopt.backend(DEVICE)
    assert f"fusedopt backend {backend.name}: {backend.reason}\n" in printed
    rows = table(printed)
    assert list(rows) == [("digits", "SGD lr=0.1"), ("digits", "Adam lr=0.001"), ("diabetes", "Adam lr=0.001")]
    for (training, _), sides in rows.items():
        assert float(sides["fusedopt"]["difference"]) < CLOSE[training]
        assert float(sides["fusedopt"]["ratio"].removesuffix("x")) > 0
        for side in sides.values():
            assert re.fullmatch(r"\d+\.\d us", side["step"])
            for part in lessons.PARTS:
                if training == "digits":
                    assert float(side[part].removesuffix("%")) > 60  # chance is 10
                else:
                    assert 0 < float(side[part]) < 1.5  # the mean of a standardised target has 1, in training data


@pytest.mark.parametrize("name", TORCH_NAMES)
def test_every_optimizer_learns_as_torch_does(name):
    lesson = lessons.classification(dtype=torch.float64)
    regime = demo.Regime(2, demo.LEARNING_RATES.get(name))
    result = demo.compare(lesson, name, regime, device=DEVICE)
    assert result.difference < 1e-9  # as for CLOSE
    theirs, ours = result.runs.values()
    assert len(theirs.seconds) == len(ours.seconds) == 2 * 17  # 1079 training images in batches of 64
    assert ours.losses[1] < ours.losses[0] == pytest.approx(theirs.losses[0], rel=1e-9)


def test_seed_decides_everything():
    curves = [
        demo.compare(lessons.classification(seed=seed), "SGD", demo.Regime(2), device=DEVICE, seed=seed)
        .runs["fusedopt"]
        .losses
        for seed in (3, 3, 4)
    ]
    assert curves[0] == curves[1] != curves[2]


def test_the_two_take_turns_on_the_same_batch(monkeypatch):
    seen = []
    learn = demo.Run.learn

    def spy(run, lesson, x, y):
        seen.append((isinstance(run.optimizer, fusedopt.registry["SGD"]), x))
        return learn(run, lesson, x, y)

    monkeypatch.setattr(demo.Run, "learn", spy)
    demo.compare(lessons.classification(), "SGD", demo.Regime(1), device=DEVICE)
    assert [ours for ours, _ in seen[:6]] == [False, True, True, False, False, True]
    assert all(first[1] is second[1] for first, second in zip(seen[::2], seen[1::2]))


def test_difference_and_ratio_are_what_the_table_says():
    lesson = lessons.regression()
    network = lesson.network(0)
    other = deepcopy(network)
    with torch.no_grad():
        other[2].bias -= 0.25
    optimizer = torch.optim.SGD(network.parameters())
    scores = dict.fromkeys(lessons.PARTS, 0.5)
    runs = {
        "torch.optim": demo.Run(network, optimizer, seconds=[9.0, 3e-5, 3e-5], scores=scores),
        "fusedopt": demo.Run(other, optimizer, seconds=[9.0, 2e-5, 2e-5], scores=scores),
    }
    rows = table(demo.table([demo.Comparison(lesson, "SGD lr=1", runs)]))["diabetes", "SGD lr=1"]
    assert rows["torch.optim"]["step"] == "30.0 us"
    assert rows["fusedopt"] | {"step": "20.0 us", "ratio": "1.50x", "difference": "2.5e-01"} == rows["fusedopt"]


def test_divergence_is_shown_not_hidden(tmp_path, capsys):
    printed = run(tmp_path, capsys, "--lr", "1e30", "--optimizer", "SGD")
    assert table(printed)["digits", "SGD lr=1e+30"]["fusedopt"]["difference"] == "nan"


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules_of_the_demo(schedule):
    """Both sides get the same learning rates, the first one's peak is the given, and clipping binds at the start."""
    regime = demo.Regime(6, 0.05, clip=0.5, schedule=schedule)
    result = demo.compare(lessons.classification(dtype=torch.float64), "SGD", regime, device=DEVICE)
    theirs, ours = result.runs.values()
    assert theirs.rates == ours.rates and len(ours.rates) == 6 * 17
    assert max(ours.rates) == pytest.approx(0.05, rel=0.03) and (len(set(ours.rates)) > 2) == (schedule != "plateau")
    assert result.difference < 1e-9
    norms, clipped = torch.stack(ours.norms), torch.tensor(ours.clipped_norms(), dtype=torch.float64)
    assert norms.max() > 0.5 >= clipped.max() and (clipped <= norms).all()


def test_plateau_looks_at_the_epochs():
    regime = demo.Regime(14, 1e-6, schedule="plateau")
    result = demo.compare(lessons.classification(), "SGD", regime, device=DEVICE)
    assert result.runs["fusedopt"].rates[-1] < 1e-6


@pytest.mark.parametrize(
    ("stop", "epochs", "reason"),
    [
        (["iterations=3"], 3, "3 iterations"),
        (["loss=1.5", "iterations=100"], None, "the loss reached 1."),
        (["change=1e9"], 10, "the parameters changed by"),
    ],
)
def test_criteria_of_the_demo(stop, epochs, reason):
    regime = demo.Regime(40, 0.1, stop=tuple(criterion(text) for text in stop))
    result = demo.compare(lessons.classification(), "SGD", regime, device=DEVICE)
    assert result.stopped.startswith(reason)
    found = len(result.runs["fusedopt"].losses)
    assert found == epochs or (epochs is None and 1 < found < 40)
    assert result.runs["torch.optim"].scores


def test_everything_at_once(tmp_path, capsys):
    printed = run(tmp_path, capsys, "--schedule", "warmup", "--clip", "0.5", "--stop", "iterations=4", "divergence=3")
    assert printed.count("stopped after 4 epochs: 4 iterations") == 3


def test_paths(tmp_path, capsys):
    out = tmp_path / "new" / "paths.png"
    assert main(["paths", "--out", str(out), "--steps", "10"]) == 0
    assert capsys.readouterr().out == f"plot: {out}\n"
    with Image.open(out) as image:
        assert min(image.size) > 800 and np.asarray(image.convert("L")).std() > 10


def test_paths_are_those_of_the_formulas():
    """Every rule of the table, F1 to F13, ends nearer to a minimum than it began, none leaves the picture."""
    assert {rule.label.split()[0] for rules in paths.FAMILIES.values() for rule in rules} == {
        f"F{number}" for number in range(1, 14)
    }
    for rules in paths.FAMILIES.values():
        for rule in rules:
            for surface in paths.SURFACES.values():
                points = paths.path(rule.optimizer, surface, 40, lr=rule.rates[surface.name], **rule.options)
                assert points.shape == (41, 2) and points[0].tolist() == list(surface.start)
                left, right, bottom, top = surface.box
                assert ((points[:, 0] > left) & (points[:, 0] < right)).all()
                assert ((points[:, 1] > bottom) & (points[:, 1] < top)).all()
                ends = [
                    (points[k] - torch.tensor(goal, dtype=points.dtype)).norm()
                    for goal in surface.goals
                    for k in (0, -1)
                ]
                assert min(ends[1::2]) < 0.25 * max(ends[::2])
    x1, x2 = paths.path("SGD", paths.SURFACES["quadratic"], 3, lr=0.4)[-1].tolist()
    assert (x1, x2) == pytest.approx((-5 * (1 - 0.08) ** 3, -2 * (1 - 1.6) ** 3))
