"""What ``python -m fusedopt`` is given: folders of images, arguments, missing packages; ``info``."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from demo_runs import (
    TORCH_NAMES,
    one_thread,  # noqa: F401, used by itself
    refused,
    run,
    run_without_plot,
    table,
    write_letters,
)
from PIL import Image

import fusedopt
from fusedopt import lessons
from fusedopt.__main__ import EXTRA


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

    printed = run_without_plot(tmp_path, capsys, "--data", root, "--optimizer", "AdamW", "--lr", "0.003")
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
    printed = run_without_plot(tmp_path, capsys, "--data", tmp_path / "one", "--optimizer", "SGD")
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
        (["--seed", str(2**64)], "has more than 64 bits"),
        (["check", "missing.py"], "missing.py is not a Python file"),
        (["check", "."], ". is not a Python file"),
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


def test_a_triton_that_cannot_be_imported(tmp_path):
    """``info`` says so, and ``check`` in the same process ends with it."""
    (tmp_path / "triton.py").write_text("raise ImportError('damaged')")
    code = (
        "import sys\n"
        f"sys.path.insert(0, {str(tmp_path)!r})\n"
        "from fusedopt.__main__ import main\n"
        "assert main(['info']) == 0\n"
        f"main(['check', {__file__!r}])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "triton      cannot be imported: damaged" in done.stdout.splitlines()
    refusal = "fusedopt: check runs Triton functions, and Triton is not installed (damaged)"
    assert refusal in done.stderr.splitlines()
