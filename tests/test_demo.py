"""``python -m fusedopt``: tiny runs end to end, the notMNIST reader, ``info``, and the messages of every failure."""

import re
import subprocess
import sys
from copy import deepcopy

import numpy as np
import pytest
import torch
from PIL import Image

import fusedopt
from fusedopt import demo, lessons, paths
from fusedopt.__main__ import EXTRA, devices, main
from fusedopt.demo_options import SCHEDULES, criterion

DEVICE = torch.device(devices()[-1])  # the default: the tests run on a GPU where there is one
TORCH_NAMES = sorted(name for name in fusedopt.registry if hasattr(torch.optim, name))
# Where s is nearly zero, Adam and RMSprop multiply a rounding of the gradient by up to lr / eps = 1e5 and 1e6. So only
# float64, which rounds at 1e-16, tells formulas apart: 1e-9 is far below a step (1e-3) and far above what is measured
# (3e-12, RMSprop). In float32 (rounding 6e-8, measured 2e-7) it is only asked that all steps together differ by one.
CLOSE = {"digits": 1e-3, "diabetes": 1e-9}


@pytest.fixture(autouse=True)
def one_thread():
    with demo.cpu_threads(1):
        yield


def write_letters(root, counts):
    """One folder per class with ``counts[class]`` images; which rows of an image are bright tells the class."""
    random = np.random.default_rng(0)
    for row, (name, number) in enumerate(counts.items()):
        (root / name).mkdir(parents=True)
        for index in range(number):
            pixels = random.integers(0, 60, (28, 28), dtype=np.uint8)
            pixels[4 * row : 4 * row + 4] += 180
            Image.fromarray(pixels).save(root / name / f"{index}.png")


def run(tmp_path, capsys, *argv):
    """A short run of main that must succeed and save a plot; returns what it printed."""
    out = tmp_path / "new" / "folder" / "plot.png"
    short = ["--device", DEVICE, "--regression-epochs", "50", "--epochs", "8", "--out", out]
    assert main([*map(str, [*short, *argv])]) == 0
    with Image.open(out) as image:
        assert image.format == "PNG"
        assert min(image.size) > 800
        assert np.asarray(image.convert("L")).std() > 10  # lines and text on white, no blank page
    printed = capsys.readouterr().out
    assert printed.endswith(f"plot: {out}\n")
    return printed


def table(printed):
    """The table's rows: (training, optimizer) -> library -> column -> text."""
    found = {}
    lines = iter(printed.splitlines())
    columns = re.split(r"\s{2,}", next(line for line in lines if line.startswith("training")))
    for line in lines:
        cells = re.split(r"\s{2,}", line.strip())
        if "torch.optim" in cells:
            key = tuple(cells[:2])
            found[key] = {"torch.optim": dict(zip(columns[2:], cells[2:]))}
        elif cells[0] == "fusedopt":
            found[key]["fusedopt"] = dict(zip(columns[2:], cells))
    return found


def refused(capsys, *argv):
    """Run main, which must stop with exit code 2 before it prints any result; returns the message on stderr."""
    with pytest.raises(SystemExit) as stop:
        main([*map(str, argv)])
    captured = capsys.readouterr()
    assert stop.value.code == 2
    assert captured.out == ""
    return captured.err


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


def test_letters_are_read_and_learned(tmp_path, capsys):
    root = tmp_path / "letters"
    write_letters(root, {"A": 30, "B": 30, "C": 30})
    (root / "A" / "broken.png").write_bytes(b"no image")
    whole = (root / "B" / "0.png").read_bytes()
    (root / "B" / "cut.png").write_bytes(whole[: len(whole) // 2])
    Image.new("L", (20, 28)).save(root / "C" / "small.png")
    Image.new("RGB", (28, 28)).save(root / "C" / "colour.png")
    (root / "C" / "readme.txt").write_text("not counted: no .png")
    (root / "empty").mkdir()

    printed = run(tmp_path, capsys, "--data", root, "--optimizer", "AdamW", "--lr", "0.003")
    assert "90 images, classes A B C; 4 files skipped (2 unreadable, 2 not 28x28 grey)" in printed
    rows = table(printed)
    assert list(rows) == [("letters", "AdamW lr=0.003"), ("diabetes", "Adam lr=0.001")]
    for side in rows["letters", "AdamW lr=0.003"].values():
        assert float(side["test"].removesuffix("%")) > 80  # chance is 33; bright rows are easily told apart


def test_pixels_keep_their_class(tmp_path):
    write_letters(tmp_path, {"A": 3, "B": 4})
    images, classes, names, skipped = lessons.read_notmnist(tmp_path)
    assert (images.shape, images.dtype, names, skipped.total()) == ((7, 784), torch.uint8, ["A", "B"], 0)
    assert classes.tolist() == [0] * 3 + [1] * 4
    bright = images.view(7, 28, 28).float().mean(2) > 150
    assert bright[:3, :4].all() and bright[3:, 4:8].all() and bright.sum() == 28


@pytest.mark.parametrize("make", ["missing", "file", "empty", "empty folders", "all corrupt"])
def test_unusable_data_is_refused(tmp_path, capsys, make):
    root = tmp_path / "data"
    if make == "file":
        root.write_text("")
    elif make == "empty":
        root.mkdir()
    elif make == "empty folders":
        (root / "A").mkdir(parents=True)
        (root / "B").mkdir()
    elif make == "all corrupt":
        for name in "AB":
            (root / name).mkdir(parents=True)
            (root / name / "0.png").write_bytes(b"\x89PNG\r\n\x1a\n but no more")
    message = refused(capsys, "--data", root, "--out", tmp_path / "plot.png")
    assert str(root) in message
    expected = {
        "missing": "no folder",
        "file": "no folder",
        "empty": "no usable image (0 files skipped): expected ROOT/<class>/*.png",
        "empty folders": "no usable image (0 files skipped)",
        "all corrupt": "no usable image (2 files skipped (2 unreadable))",
    }
    assert expected[make] in message


def test_little_data_is_used_and_said_so(tmp_path, capsys):
    """One class; and, of the four images in all, some for training alone."""
    write_letters(tmp_path / "one", {"A": 9})
    (tmp_path / "one" / "B").mkdir()
    (tmp_path / "one" / "B" / "broken.png").write_bytes(b"no image")
    printed = run(tmp_path, capsys, "--data", tmp_path / "one", "--optimizer", "SGD")
    assert "9 images, classes A; 1 files skipped (1 unreadable); one class alone is nothing to tell apart" in printed
    assert table(printed)["letters", "SGD lr=0.1"]["fusedopt"]["train"] == "100.0%"
    write_letters(tmp_path / "few", {"A": 2, "B": 2})
    printed = run(tmp_path, capsys, "--data", tmp_path / "few", "--optimizer", "SGD")
    assert "fewer than five leave nothing for validation and test" in printed
    assert table(printed)["letters", "SGD lr=0.1"]["fusedopt"]["validation"] == "nan%"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--schedule", "linear"], "invalid choice: 'linear' (choose from"),
        (["--clip", "0"], "0 is not a finite number above zero"),
        (["--stop", "accuracy=1"], "'accuracy=1' is none of iterations=NUMBER, change=NUMBER"),
        (["--stop", "loss=low"], "'loss=low': 'low' is no float"),
        (["--stop", "loss=0.1", "iterations=0"], "Invalid number: 0; give at least 1"),
        (["--stop", "change=nan"], "Invalid tolerance: nan"),
        (["paths", "--steps", "0"], "0 is not a finite number above zero"),
        (["paths", "--out", "."], "Is a directory"),
        (["--optimizer", "Adm"], "invalid choice: 'Adm' (choose from"),
        (["--device", "gpu"], "invalid choice: 'gpu' (choose from"),
        (["--epochs", "0"], "0 is not a finite number above zero"),
        (["--epochs", "ten"], "invalid int value: 'ten'"),
        (["--lr", "nan"], "nan is not a finite number above zero"),
        (["--out", "."], "Is a directory"),
    ],
)
def test_wrong_arguments_are_refused(capsys, argv, message):
    assert message in refused(capsys, *argv)


@pytest.mark.parametrize("package", EXTRA)
def test_missing_extra_says_what_to_install(monkeypatch, capsys, package):
    modules = ("demo", "lessons", "plots")
    for name in [*sys.modules]:
        if name.partition(".")[0] == package or name in [f"fusedopt.{module}" for module in modules]:
            monkeypatch.delitem(sys.modules, name)
    for module in modules:
        monkeypatch.delattr(fusedopt, module, raising=False)
    monkeypatch.setitem(sys.modules, package, None)  # an import of it now raises ModuleNotFoundError
    message = refused(capsys)
    assert message.count("\n") == 1
    assert EXTRA[package] in message
    assert 'pip install "fusedopt[demo]"' in message and "pip install '.[demo]'" in message


def test_info_needs_no_extra():
    code = (
        "import runpy, sys\n"
        f"sys.modules.update(dict.fromkeys({[*EXTRA, 'triton']!r}))\n"
        "sys.argv = ['fusedopt', 'info']\n"
        "runpy.run_module('fusedopt', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = dict(line.split(maxsplit=1) for line in done.stdout.splitlines())
    assert lines["fusedopt"] == fusedopt.__version__
    assert lines["python"].startswith(".".join(map(str, sys.version_info[:3])))
    assert lines["torch"] == torch.__version__
    assert lines["triton"] == "not installed"
    assert lines["numpy"] == np.__version__
    assert lines["cpu"].startswith("backend torch: ")
    assert set(TORCH_NAMES) <= set(lines["optimizers"].split(", "))


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
