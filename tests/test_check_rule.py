"""``check_rule``: it passes the package's rules, and sees what is wrong with others."""

import math
import sys

import pytest
from options import NAMES, STATEFUL

import fusedopt
from fusedopt.check import check_file
from fusedopt.custom import ema, jit, tl


@pytest.mark.parametrize("name", NAMES)
def test_rules_of_the_package_pass(name, needs_triton):
    fusedopt.check_rule(fusedopt.registry[name], steps=2, sizes=(37,), **STATEFUL[name])


@jit
def kernel(g, state, h):
    m = ema(state[0], g, h[0])
    return m, (m,)


def twin(g, state, h):
    return state[0].lerp_(g, h[0])


@jit
def another_direction(g, state, h):
    m = ema(state[0], g, h[0])
    return m + tl.where(g == 0, 1.0, 0.0), (m,)


@jit
def another_state(g, state, h):
    m = ema(state[0], g, h[0])
    return m, (m * 1.001,)


@jit
def one_state_more(g, state, h):
    m = ema(state[0], g, h[0])
    return m, (m, m)


@jit
def one_number_more(g, state, h):
    m = ema(state[0], g, h[1])
    return m, (m,)


def writes_to_g(g, state, h):
    return g.mul_(h[0]).add_(state[0].lerp_(g, 0.5))


def leaves_states(g, state, h):
    state[0] = state[0].lerp(g, h[0])
    return state[0]


def changes_dtype(g, state, h):
    return state[0].lerp_(g, h[0]).half()


def mixes_elements(g, state, h):
    state[0].lerp_(g, h[0])
    return state[0] / state[0].norm()


@pytest.mark.parametrize(
    ("kernel", "twin", "message"),
    [
        (another_direction, twin, r"step 1, float64, .* magnitude 0: u\[0\] is 1.0 by .*Triton.*, 0.0 by .*twin"),
        (another_state, twin, r"the new state 'm'\[\d\] is "),
        (one_state_more, twin, "does not run: .*as many states"),
        (one_number_more, twin, "does not run: "),
        (kernel, writes_to_g, "leave g alone"),
        (kernel, leaves_states, "in place"),
        (kernel, changes_dtype, r"like g, and returns torch.float16"),
        (kernel, mixes_elements, "by the t"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_differences(kernel, twin, message, needs_triton):
    with pytest.raises(AssertionError, match=message):
        fusedopt.check_rule(fusedopt.Rule("mean", ("m",), twin, kernel=kernel), (0.1,), sizes=(5,))


BROKEN = """
import beside
import fusedopt


class OneNumber(fusedopt.FusedOptimizer):
    RULE = fusedopt.Rule("one", (), lambda g, state, h: g * h[0])

    def __init__(self, params, lr=0.1, **settings):
        super().__init__(params, {"lr": lr}, **settings)

    def rule(self, group):
        return self.RULE

    def hyper(self, group, t):
        return 0.1


class TwoNumbers(OneNumber):
    def hyper(self, group, t):
        return ()
"""


def test_a_file_of_broken_classes(needs_triton, tmp_path, monkeypatch):
    """Each is reported, whatever it raises; the file may import what stands beside it."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "beside.py").write_text("")
    (tmp_path / "broken_rules.py").write_text(BROKEN)
    report = check_file(tmp_path / "broken_rules.py")
    assert report["OneNumber"] == "TypeError: hyper() of OneNumber must return a tuple of numbers, got 0.1"
    assert "the torch twin of 'one' does not run with h=(): IndexError" in report["TwoNumbers"]


def test_numbers_that_float32_cannot_hold(needs_triton):
    """Overflow on both sides alike, and NaN, are no difference."""
    rule = fusedopt.Rule("mean", ("m",), twin, kernel=kernel)
    fusedopt.check_rule(rule, (0.1,), magnitudes=(1e38, math.nan), sizes=(5,))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((fusedopt.Adam, (0.1,)), "leave h out"),
        ((fusedopt.Rule("mean", ("m",), twin, kernel=kernel),), "checked with its numbers"),
        (("adam",), "got 'adam'"),
    ],
)
def test_wrong_subjects(arguments, message):
    with pytest.raises(TypeError, match=message):
        fusedopt.check_rule(*arguments)
