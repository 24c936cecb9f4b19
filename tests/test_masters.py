"""``master_state_dict`` and ``load_master_state_dict``, and forms that are refused."""

import pickle
from itertools import chain, repeat
from unittest import mock

import pytest
import torch
from pairs import assert_same, same_bits, snapshot
from stored_training import MASTERS, made, run, through_file

import fusedopt
from fusedopt import conversion


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("master", MASTERS)
def test_masters(master, when, named):
    """A round trip: exact where the form is; rounded to the form once where it is not."""
    params, optimizer = made(master=master, named=named)
    run(params, optimizer, 3)
    masters = optimizer.master_state_dict()
    assert list(masters) == [f"layer.{k}" if named else k for k in range(3)]
    for p, value in zip(params, masters.values()):
        assert value.dtype is torch.float32 and value.shape == p.shape
        assert torch.equal(value.bfloat16(), p) or master.startswith("split")
    assert all((value != p).any() for p, value in zip(params, masters.values())) == (master not in (None, "stochastic"))
    others, other = made(master=master, named=named, seed=7)
    if when == "after":
        run(others, other, 1)
    other.load_master_state_dict(through_file(masters))
    for value, back in zip(masters.values(), other.master_state_dict().values()):
        assert same_bits(value, back)
    assert all(map(same_bits, params, others))
    # And they are masters that the next step uses.
    pickle.loads(pickle.dumps(other))
    other.load_state_dict(other.state_dict())
    for p in others:
        p.grad = torch.zeros_like(p)
    for group in other.param_groups:
        group["lr"] = 0.0
    other.step()
    for value, back in zip(masters.values(), other.master_state_dict().values()):
        assert same_bits(value, back)
    assert not torch.equal(masters[next(iter(masters))], made(master=master, seed=9)[1].master_state_dict()[0])


def test_any_float32_weights_can_be_loaded():
    exact = [torch.randn(shape) for shape in (5000, 33, (100, 64))]
    for master in MASTERS:
        params, optimizer = made(master=master)
        optimizer.load_master_state_dict(dict(enumerate(exact)))
        for p, value, back in zip(params, exact, optimizer.master_state_dict().values()):
            # 16 significant bits.
            bound = {"split": 0, "fp32": 0, "split8": 2**-16, "kahan": 2**-16}.get(master, 2**-8)
            assert ((back - value).abs() <= bound * value.abs()).all()
            assert ((p - value).abs() <= 2**-8 * value.abs()).all()


WRONG_MASTERS = {
    "a missing one": lambda masters: masters.pop(1),
    "an unknown one": lambda masters: masters.update(unknown=torch.ones(3)),
    "another shape": lambda masters: masters.update({1: torch.ones(34)}),
    "integers": lambda masters: masters.update({1: torch.ones(33, dtype=torch.int32)}),
    "no tensor": lambda masters: masters.update({1: 3.0}),
}


@pytest.mark.parametrize("case", WRONG_MASTERS)
def test_masters_that_do_not_fit_change_nothing(case):
    params, optimizer = made(master="split")
    run(params, optimizer, 1)
    masters = {key: value + 1 for key, value in optimizer.master_state_dict().items()}
    WRONG_MASTERS[case](masters)
    before = snapshot(optimizer)
    with pytest.raises((ValueError, TypeError), match="master"):
        optimizer.load_master_state_dict(masters)
    with pytest.raises(TypeError, match="master"):
        optimizer.load_master_state_dict(list(masters.values()))
    assert_same(before, snapshot(optimizer))


def test_forms_that_make_no_sense():
    wide, half = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3, dtype=torch.float16))
    narrow = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    for master in MASTERS[1:]:
        with pytest.raises(ValueError, match=f"{master}.*float32"):
            fusedopt.AdamW([wide], master=master)
        optimizer = fusedopt.AdamW([wide])
        with pytest.raises(ValueError, match=master):
            optimizer.master = master
        assert optimizer.master is None
        with pytest.raises(ValueError, match=master):
            fusedopt.convert(torch.optim.AdamW([wide]), master=master)
        # Among 16-bit ones, a float32 parameter needs none.
        assert fusedopt.AdamW([wide, narrow], master=master).master == master
    for master in ("split", "split8"):
        with pytest.raises(ValueError, match="float16"):
            fusedopt.AdamW([half], master=master)
        optimizer = fusedopt.AdamW([narrow], master=master)
        narrow.grad = torch.ones_like(narrow)
        optimizer.add_param_group({"params": [half]})
        half.grad = torch.ones_like(half)
        with pytest.raises(ValueError, match="float16"):
            optimizer.step()
        assert torch.equal(narrow, torch.ones_like(narrow))
    with pytest.raises(ValueError, match="no states"):
        fusedopt.SGD([wide], state_dtype="8bit")


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(("where", "calls"), [("encode", 1), ("_named", 0), ("gather_anew", 0)])
@pytest.mark.parametrize("name", ["AdamW", "SGD"])
def test_an_interrupt_leaves_no_part_of_them(name, where, calls, when):
    """Ctrl-C on the way: what was begun is finished."""
    exact = {k: torch.randn(p.shape) for k, p in enumerate(made()[0])}
    (params, optimizer), (others, other) = (made(name, master="split") for _ in range(2))
    if when == "after":
        run(params, optimizer, 1)
        run(others, other, 1)
    other.load_master_state_dict(exact)
    effects = chain(repeat(mock.DEFAULT, calls), [KeyboardInterrupt], repeat(mock.DEFAULT))
    watched = mock.patch.object(conversion, where, wraps=getattr(conversion, where), side_effect=effects)
    with watched, pytest.raises(KeyboardInterrupt):
        optimizer.load_master_state_dict(exact)
    assert_same(snapshot(optimizer), snapshot(other))


@pytest.mark.parametrize("name", ["SGD", "Rprop"])
def test_loaded_masters_are_kept_by_a_skipped_step(name):
    """Whose states are dropped, since no step has written them."""
    params, optimizer = made(name, master="split", skip_nonfinite=True)
    exact = {k: torch.randn(p.shape) for k, p in enumerate(params)}
    optimizer.load_master_state_dict(exact)
    for p in params:
        p.grad = torch.full_like(p, torch.nan)
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert all(map(same_bits, optimizer.master_state_dict().values(), exact.values()))


@pytest.mark.parametrize("after", MASTERS)
@pytest.mark.parametrize("before", MASTERS)
def test_masters_loaded_after_another_form_was_chosen(before, after):
    """What the form before has left beside the parameters belongs to other values."""
    params, optimizer = made(master=before)
    run(params, optimizer, 2)
    exact = {k: torch.randn(p.shape) for k, p in enumerate(params)}
    optimizer.master = after
    optimizer.load_master_state_dict(exact)
    _, fresh = made(master=after)
    fresh.load_master_state_dict(exact)
    assert all(map(same_bits, optimizer.master_state_dict().values(), fresh.master_state_dict().values()))
    for p in params:
        p.grad = torch.zeros_like(p)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.step()
    if after != "stochastic":  # which draws anew
        assert all(map(same_bits, optimizer.master_state_dict().values(), fresh.master_state_dict().values()))
