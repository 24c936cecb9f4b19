"""Short runs of the demo, and what it prints."""

import re
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

import fusedopt
from fusedopt import demo, plots
from fusedopt.__main__ import devices, main

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
    printed = printed_by_run(out, capsys, *argv)
    with Image.open(out) as image:
        assert image.format == "PNG"
        assert min(image.size) > 800
        assert np.asarray(image.convert("L")).std() > 10  # lines and text on white, no blank page
    return printed


def run_without_plot(tmp_path, capsys, *argv):
    """The same where the plot, which takes longest to draw, says nothing that those of other runs do not."""
    with mock.patch.object(plots, "plot"):
        return printed_by_run(tmp_path / "plot.png", capsys, *argv)


def printed_by_run(out, capsys, *argv):
    short = ["--device", DEVICE, "--regression-epochs", "50", "--epochs", "8", "--out", out]
    assert main([*map(str, [*short, *argv])]) == 0
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
