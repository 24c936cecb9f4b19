"""Every two features together: the kernels do what the torch backend does, or both refuse, and say why.

Programs with many features cover all pairs of those that go together. FUSEDOPT_PAIRS=all runs each pair by itself, with
every optimizer, which takes minutes.
"""

import functools
import itertools
import os

import pytest
import torch
from feature_runs import Run
from features import FEATURES, KINDS, LR, ORDER, STEPS, absent, program
from graphs import capture

from fusedopt import storage
from fusedopt.settings import EpsSettings, Settings

pytestmark = [
    pytest.mark.usefixtures("needs_triton"),
    pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide):RuntimeWarning"),
]

ALL = os.environ.get("FUSEDOPT_PAIRS") == "all"
RULES = list(FEATURES["rule"]) if ALL else ["SGD", "NAdam", "StableAdamW"]
"""Where not every optimizer can have its turn: one that counts no steps, one with numbers beside the count, one that
needs means."""

TOGETHER = "needs? the gradients|gradients together|would need"
WIDE = "is for bfloat16 and float16 parameters"
ONE = "launches=1 is not possible here: "

REFUSED = {
    ("GradScaler.unscale_", "float16"): "Attempting to unscale FP16 gradients",
    ("torch.amp.GradScaler", "float16"): "Attempting to unscale FP16 gradients",
    ("torch.amp.GradScaler", "graph"): "when stream is capturing|error during capture",
    ("clip_grad_norm_", "grad_scale, found_inf"): "still multiplied by the loss scale",
    ("clip_grad_norm_", "launches=1"): ONE + r"clip_grad_norm_\(\) takes the norm before the step",
    ("cautious", "launches=1"): ONE + "cautious=True",
    ("StableAdamW", "launches=1"): ONE + "cautious=True, or another setting that needs means",
    ("launches=1", "8-bit states"): ONE + "parameters of 2 devices, dtypes, rules or forms of states",
    ("launches=1", "two dtypes"): ONE + "parameters of 2 devices, dtypes, rules or forms of states",
    ("float16", "split"): "choose 'fp32', 'kahan' or 'stochastic'",
    ("float16", "split8"): "choose 'fp32', 'kahan' or 'stochastic'",
    **{(dtype, master): WIDE for dtype in ("float64", "two dtypes") for master in FEATURES["master"]},
    **{
        (feature, "gradient release"): TOGETHER
        for feature in ("max_grad_norm", "normalize", "clip_grad_norm_", "skip_nonfinite", *FEATURES["track"])
    },
    **{(feature, "gradient release"): TOGETHER for feature in FEATURES["gradients"]},
    ("GradScaler", "gradient release"): "gradient release cannot be combined with a GradScaler",
    ("GradScaler.unscale_", "gradient release"): "gradient release cannot be combined with a GradScaler",
    ("torch.amp.GradScaler", "gradient release"): "No inf checks were recorded",
}  # fmt: skip
"""Pairs that nobody can have, and what the error says."""


def goes_together(names):
    return not any(pair in REFUSED for pair in itertools.combinations(sorted(names, key=ORDER.index), 2))


PAIRS = [
    pair
    for pair in itertools.combinations([name for name in ORDER if KINDS[name] != "rule" or name in RULES], 2)
    if KINDS[pair[0]] != KINDS[pair[1]] and not absent(program(pair))
]
"""In the order of the table."""


def covering(pairs):
    """Programs as sets of features, one of a kind, that have all these pairs among them: each takes, one by one, the
    feature that brings most pairs that none has yet."""
    left, rows = set(pairs), []
    while left:
        row = set(min(left, key=lambda pair: (ORDER.index(pair[0]), ORDER.index(pair[1]))))
        while True:
            kinds = {KINDS[name] for name in row}
            news = {}
            for name in ORDER:
                if KINDS[name] not in kinds and (KINDS[name] != "rule" or name in RULES):
                    found = {tuple(sorted((name, other), key=ORDER.index)) for other in row} & left
                    if found and goes_together(row | {name}) and not absent(program(row | {name})):
                        news[name] = len(found)
            if not news:
                break
            row.add(max(news, key=news.get))
        left -= set(itertools.combinations(sorted(row, key=ORDER.index), 2))
        rows.append(tuple(sorted(row, key=ORDER.index)))
    return rows


def test_every_setting_is_a_feature():
    """But for the backend, which is what is compared, and what ranks share."""
    used = {name for features in FEATURES.values() for feature in features for name in program([feature]).settings}
    assert used == {name for cls in (Settings, EpsSettings) for name in cls.fields()} - {"backend", "clip_group"}


def steps(names, device, monkeypatch):
    """Both backends take every step from the same numbers, of which even small tensors keep some in 8 bits."""
    monkeypatch.setattr(storage, "SMALL", 200)
    made = program(names)
    kernel, twin = (Run(made, device, backend) for backend in ("triton", "torch"))
    for number in range(STEPS):
        kernel.step(number, functools.partial(capture, monkeypatch))
        twin.step(number, None)
        yield number, kernel, twin
        twin.follow(kernel)


DIGITS = {"kahan": 16, "split8": 16, "split": 24, "fp32": 24}
EXACT = 4e-6
"""Some roundings of float32: of a dozen operations, and of values a few times their result."""


def slack(name, run):
    """What arithmetic may differ by in all. A step's length is that of parameters' differences here, which float32
    rounds; numbers of 16 bits add up to exactly zero now and then, on either side of which the cautious mean jumps by
    an element in 35; and plain 16-bit parameters are averaged after they are rounded where torch's kernels do that."""
    narrow = max(dtype.itemsize for dtype in run.program.dtypes) == 2
    if name == "update_norm":
        return 2e-6
    if narrow and run.opt.cautious:
        return 0.1 * LR
    if narrow and name.startswith("average") and run.opt.master is None:
        return (1 - run.opt.ema_decay) * max(torch.finfo(dtype).eps for dtype in run.program.dtypes)
    return 0.0


def grain(name, y, run):
    """The distance between neighbours of what is stored, near each of the values y."""
    kind, _, number = name.rpartition(" ")
    if kind == "parameter":
        dtype = run.params[int(number)].dtype
    elif kind == "master":
        form = run.opt.master if run.params[int(number)].dtype is torch.bfloat16 else "fp32"
        return 2.0 ** (1 - DIGITS[form]) * y.abs() if form in DIGITS else torch.zeros_like(y)
    elif kind in ("average", "gradient", ""):
        return torch.zeros_like(y)
    else:
        dtype = run.opt.state[run.params[int(number)]][kind].dtype
    largest = y.abs().max() if y.numel() else y
    if dtype is torch.int8:
        return torch.full_like(y, 1.0) * largest / 127
    if dtype is torch.uint8:
        return 2 * (largest * y).sqrt() / 255 + largest / 255**2
    return torch.finfo(dtype).eps * y.abs() if dtype.itemsize < 4 else torch.zeros_like(y)


def compare(number, kernel, twin):
    """Arithmetic differs by roundings, so that a value that lies half way between two may be stored as either."""
    found, expected = kernel.seen(), twin.seen()
    assert found.keys() == expected.keys(), number
    for name, x in found.items():
        x, y = x.cpu().double(), expected[name].cpu().double()
        assert x.shape == y.shape
        if "sq" in name:
            # What overflowed stays infinite in the kernels, also where a NaN comes, which the parameter shows.
            x = torch.where(x.isinf() & y.isnan(), y, x)
        assert torch.equal(x.isfinite(), y.isfinite()), f"{name} at step {number}"
        odd = ~y.isfinite()
        assert torch.equal(x[odd].nan_to_num(nan=0.5), y[odd].nan_to_num(nan=0.5)), f"{name} at step {number}"
        x, y = x[~odd], y[~odd]
        error, step = (x - y).abs(), grain(name, y, kernel)
        exact = EXACT * (y.abs() + (y.abs().mean() if y.numel() else 0)) + slack(name, kernel)
        worst = (error - 1.01 * step - exact).max() if y.numel() else 0
        assert worst <= 0, f"{name} at step {number} is off by {error.max():.3g}: {x} instead of {y}"
        assert (error > exact).sum() <= max(1, 0.03 * y.numel()), f"{name} at step {number}: {x} instead of {y}"


@pytest.mark.parametrize("names", covering([pair for pair in PAIRS if pair not in REFUSED]), ids=", ".join)
def test_many_features(names, device, monkeypatch):
    for step in steps(names, device, monkeypatch):
        compare(*step)


@pytest.mark.parametrize("pair", REFUSED, ids=", ".join)
def test_refused_pairs(pair, device, monkeypatch):
    """By both backends, unless it is about launches or graphs."""
    with pytest.raises((RuntimeError, ValueError, AssertionError), match=REFUSED[pair]):
        for step in steps(pair, device, monkeypatch):
            compare(*step)


@pytest.mark.parametrize("pair", [pair for pair in PAIRS if ALL and pair not in REFUSED], ids=", ".join)
def test_two_features(pair, device, monkeypatch):
    for step in steps(pair, device, monkeypatch):
        compare(*step)
