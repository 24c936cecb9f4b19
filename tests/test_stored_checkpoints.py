"""Checkpoints of parameters and states in forms of their own: exact in the same form, loadable in every other."""

import copy
import itertools
import pickle

import pytest
import torch
from cases import every_optimizer
from options import LR, STATEFUL
from pairs import assert_same, same_bits, snapshot
from stored_training import EXACT, MASTERS, STATE_DTYPES, copy_into, dtypes, every_form, made, run, through_file

import fusedopt


@pytest.mark.parametrize("compact", [False, True])
@every_form
def test_the_same_settings_go_on_as_if_nothing_had_happened(master, state_dtype, compact):
    """To the last bit if compact. In float32 too, but for scales, which are rounded once more, and for what Kahan
    compensation has below a float32. The parameters are loaded after the state."""
    params, optimizer = made(master=master, state_dtype=state_dtype)
    run(params, optimizer, 3)
    saved = through_file(optimizer.state_dict(compact=compact))
    others, other = made(master=master, state_dtype=state_dtype, seed=7)
    before = dtypes(params, optimizer)
    other.load_state_dict(saved)
    assert dtypes(others, other) == before
    copy_into(others, params)
    exact = compact or (state_dtype != "8bit" and master != "kahan")
    for p, q in zip(params, others):
        for key, value in optimizer.state[p].items():
            if exact or value.dtype in (torch.int8, torch.uint8, torch.int16):
                assert same_bits(other.state[q][key], value), key
    run(params, optimizer, 2)
    run(others, other, 2)
    for p, q in zip(params, others):
        if exact:
            assert same_bits(p, q)
        # A rounding of float32 makes one step of bfloat16 at most, and rarely.
        torch.testing.assert_close(p, q, rtol=2**-7, atol=0)
        assert (p != q).double().mean() < 0.01


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize(("master", "state_dtype"), [("split8", "8bit"), ("kahan", torch.bfloat16), ("fp32", None)])
def test_every_other_setting_takes_it_over(master, state_dtype, compact):
    """Moments to the precision of the coarser of both forms, parameters as exactly as both have them."""
    params, optimizer = made(master=master, state_dtype=state_dtype)
    run(params, optimizer, 3)
    saved = optimizer.state_dict(compact=compact)
    exact = optimizer.state_dict()["state"]
    for new_master, new_dtype in itertools.product(MASTERS, STATE_DTYPES):
        fresh = made(master=new_master, state_dtype=new_dtype)
        run(*fresh, 1)
        others, other = made(master=new_master, state_dtype=new_dtype, seed=7)
        copy_into(others, params)
        run(others, other, 1)
        before = [p.detach().clone() for p in others]
        other.load_state_dict(saved)
        copy_into(others, params)
        shown = other.state_dict()["state"]
        for k in exact:
            assert exact[k]["step"] == shown[k]["step"]
            for key in ("exp_avg", "exp_avg_sq"):
                x, y = exact[k][key].double(), shown[k][key].double()
                # Half a step of 127, or of 255 under the root; bfloat16 rounds at 2^-9.
                assert (x - y).abs().max() <= max(1 / 254, 2**-9) * 1.01 * x.abs().max()
        assert not all(map(torch.equal, before, others))
        other.param_groups[0]["lr"] = 0.0
        run(others, other, 1)
        assert dtypes(others, other) == dtypes(*fresh)
        if new_master in EXACT:
            for k, value in other.master_state_dict().items():
                torch.testing.assert_close(value, exact[k]["master"], rtol=2**-23, atol=0)


PRECISION = {"fp32": 2**-23, "split": 2**-23, "split8": 2**-15, "kahan": 2**-15}
"""Of a master between 1 and 4: a bit of float32; half of what 8 bits more than bfloat16 resolve, or all of it where the
parameter was rounded the other way."""


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize(("master", "other_master"), list(itertools.permutations(PRECISION, 2)))
def test_a_parameter_that_was_rounded_the_other_way_keeps_its_master(master, other_master, compact):
    """Forms round numbers half way between two parameters, or near to that, to different ones. Every lower half of a
    float32, between parameters of even and of odd bits."""
    values = torch.arange(0x3F800000, 0x3F820000, dtype=torch.int32).view(torch.float32)
    values = torch.cat([values, -2 * values])
    p = torch.nn.Parameter(values.bfloat16())
    optimizer = fusedopt.AdamW([p], master=master)
    optimizer.load_master_state_dict({0: values})
    saved, exact = optimizer.state_dict(compact=compact), optimizer.master_state_dict()[0]
    q = torch.nn.Parameter(p.detach().clone())
    other = fusedopt.AdamW([q], lr=0.0, master=other_master)
    other.load_state_dict(saved)
    other.param_groups[0]["lr"], q.grad = 0.0, torch.zeros_like(q)
    for taken_over in (other.master_state_dict, lambda: other.step() or other.master_state_dict()):
        torch.testing.assert_close(taken_over()[0], exact, rtol=PRECISION[other_master], atol=0)
        assert same_bits(p, q)


@every_optimizer
@pytest.mark.parametrize(("master", "state_dtype"), [("split8", "8bit"), ("stochastic", torch.bfloat16)])
def test_torch_takes_what_state_dict_shows(name, master, state_dtype):
    params, optimizer = made(name, master, state_dtype)
    run(params, optimizer, 3)
    saved = through_file(optimizer.state_dict())
    torch_class = getattr(torch.optim, name, None)
    if torch_class is None:
        return
    theirs = torch_class([torch.nn.Parameter(p.detach().float()) for p in params], **{"lr": LR, **STATEFUL[name]})
    twins = theirs.param_groups[0]["params"]
    for p in twins:
        p.grad = torch.zeros_like(p)
    theirs.step()
    keys = list(theirs.state[twins[0]])
    for k, entry in saved["state"].items():
        extra = (["master"] if master == "split8" else []) + (["step"] if not optimizer.counts_steps else [])
        assert sorted(entry) == sorted({*keys, *extra} - (set() if master == "stochastic" else {"step"} - set(keys)))
        assert {value.dtype for value in entry.values()} == {torch.float32}
        assert all(value.shape in ((), params[k].shape) for value in entry.values())
    theirs.load_state_dict(saved)
    theirs.step()
    optimizer.load_state_dict(theirs.state_dict())
    run(params, optimizer, 1)


def test_state_dict_is_torchs_own_where_nothing_is_stored_otherwise():
    """Live tensors, as torch's."""
    params, optimizer = made()
    run(params, optimizer, 1)
    for shown in (optimizer.state_dict(), optimizer.state_dict(compact=True)):
        assert all(shown["state"][k][key] is x for k, p in enumerate(params) for key, x in optimizer.state[p].items())


def test_a_parameter_with_gaps_is_shown_without_its_graph():
    """Which nobody could copy."""
    p = torch.nn.Parameter(torch.ones(6, 8, dtype=torch.bfloat16)[:, ::2])
    optimizer = fusedopt.AdamW([p], master="kahan")
    run([p], optimizer, 1)
    assert not any(value.requires_grad for value in optimizer.state_dict()["state"][0].values())


def test_hooks_see_what_state_dict_shows():
    params, optimizer = made(master="split", state_dtype="8bit")
    run(params, optimizer, 1)
    seen = []
    optimizer.register_state_dict_post_hook(lambda opt, shown: seen.append(shown["state"][0]["exp_avg"].dtype))
    optimizer.register_state_dict_post_hook(lambda opt, shown: {**shown, "more": 1})
    assert optimizer.state_dict()["more"] == 1
    optimizer.state_dict(compact=True)
    assert seen == [torch.float32, torch.int8]
    optimizer.register_load_state_dict_pre_hook(lambda opt, loaded: {**loaded, "state": {}})
    optimizer.load_state_dict(optimizer.state_dict())
    assert not optimizer.state


@pytest.mark.parametrize("carry", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
@every_form
def test_copies_go_on_by_themselves(carry, master, state_dtype):
    params, optimizer = made(master=master, state_dtype=state_dtype, seed=3)
    run(params, optimizer, 2)
    others, other = carry((params, optimizer))
    run(params, optimizer, 2, seed=5)
    run(others, other, 2, seed=5)
    assert all(map(same_bits, params, others))
    assert_same(snapshot(optimizer), snapshot(other))


def test_settings_changed_in_mid_training():
    """The values go on in the new form."""
    params, optimizer = made()
    run(params, optimizer, 2)
    before = copy.deepcopy(optimizer.state_dict()["state"])
    for master, state_dtype in [
        ("kahan", "8bit"),
        ("split", torch.float32),
        (None, None),
        ("fp32", "8bit"),
        (None, None),
    ]:
        optimizer.master, optimizer.state_dtype = master, state_dtype
        fresh = made(master=master, state_dtype=state_dtype)
        run(*fresh, 1)
        for group in optimizer.param_groups:
            group["lr"], group["betas"] = 0.0, (1 - 1e-12, 1 - 1e-12)
        run(params, optimizer, 1)
        if (master, state_dtype) != (None, None):
            assert dtypes(params, optimizer) == dtypes(*fresh)
        else:
            assert not {"master", "master_low", "compensation", "exp_avg_scale"} & optimizer.state[params[0]].keys()
    for k, entry in optimizer.state_dict()["state"].items():
        for key in ("exp_avg", "exp_avg_sq"):
            error = (entry[key].double() - before[k][key].double()).abs().max()
            assert error <= (2 / 254 + 2 * 2**-9) * before[k][key].double().abs().max()


@every_form
def test_state_dict_behind_settings_that_were_taken_back(master, state_dtype):
    """Until the next step states are as they were stored; what is shown are their values, as before."""
    params, optimizer = made(master=master, state_dtype=state_dtype)
    run(params, optimizer, 2)
    before = optimizer.state_dict()["state"]
    optimizer.master = optimizer.state_dtype = None
    shown = optimizer.state_dict()["state"]
    for k in range(len(params)):
        assert shown[k].keys() == before[k].keys()
        assert all(torch.equal(x, shown[k][key]) for key, x in before[k].items())


WRONG_ENTRIES = {
    "signed roots": ("exp_avg_sq", lambda x: x.view(torch.int8), "'exp_avg_sq' has dtype torch.int8.* torch.uint8"),
    "unsigned averages": ("exp_avg", lambda x: x.view(torch.uint8), "'exp_avg' has dtype torch.uint8.* torch.int8"),
    "wider codes": ("exp_avg", lambda x: x.int(), "'exp_avg' has dtype torch.int32.* torch.int8"),
    "codes that were cast": ("exp_avg", lambda x: x.bfloat16(), "'exp_avg_scale' beside it belongs to 8 bits"),
    "scales of integers": ("exp_avg_scale", lambda x: x.int(), "'exp_avg_scale'.* must be float32, is torch.int32"),
    "a master of another dtype": ("master_low", lambda x: x.int(), "dtype torch.int32, not torch.int16 or torch.int8"),
    "a master that was cast": ("master_low", lambda x: x.bfloat16(), "dtype torch.bfloat16, not torch.int16"),
    "no master": ("master_low", lambda x: 3, "must be a tensor, got int"),
    "another block size": ("exp_avg_scale", lambda x: x.repeat_interleave(2), "256"),
    "a missing scale": ("exp_avg_sq_scale", None, "'exp_avg_sq_scale', which must be float32, is not there"),
    "a truncated tensor": ("exp_avg", lambda x: x[:-1], "shape"),
    "a truncated scale": ("exp_avg_sq_scale", lambda x: x[:-1], "256"),
    "a truncated master": ("master_low", lambda x: x[:-1], "shape"),
    "no tensor": ("exp_avg", lambda x: 3, "tensor"),
}


@pytest.mark.parametrize("case", WRONG_ENTRIES)
def test_broken_compact_checkpoints_change_nothing(case):
    params, optimizer = made(master="split", state_dtype="8bit")
    run(params, optimizer, 2)
    saved = copy.deepcopy(optimizer.state_dict(compact=True))
    key, change, message = WRONG_ENTRIES[case]
    if change is None:
        del saved["state"][0][key]
    else:
        saved["state"][0][key] = change(saved["state"][0][key])
    before, states = snapshot(optimizer), [dict(optimizer.state[p]) for p in params]
    for other in (optimizer, made(master="fp32", state_dtype=torch.float32)[1]):
        with pytest.raises((ValueError, TypeError), match=message) as error:
            other.load_state_dict(saved)
        assert "parameter 0 of group 0" in str(error.value)
    assert_same(before, snapshot(optimizer))
    assert all(optimizer.state[p][k] is x for p, state in zip(params, states) for k, x in state.items())


def test_masters_that_were_cast_are_the_parameters():
    """torch.optim casts what it loads to the parameter's dtype."""
    params, optimizer = made(master="fp32")
    run(params, optimizer, 2)
    saved = optimizer.state_dict()
    for entry in saved["state"].values():
        entry["master"] = entry["master"].bfloat16()
    optimizer.load_state_dict(saved)
    assert all(map(torch.equal, optimizer.master_state_dict().values(), [p.float() for p in params]))
    saved["state"][0]["master"] = saved["state"][0]["master"].int()
    with pytest.raises(ValueError, match=r"\['master'\] has dtype torch.int32, not torch.float32"):
        optimizer.load_state_dict(saved)


def test_broken_states_are_noticed_by_step():
    params, optimizer = made(state_dtype="8bit")
    run(params, optimizer, 1)
    before = [p.detach().clone() for p in params]
    optimizer.state[params[0]]["exp_avg_scale"] = torch.ones(3)
    with pytest.raises(RuntimeError, match=r"20 scales.*256.*shape \(3,\)"):
        run(params, optimizer, 1)
    assert all(map(torch.equal, params, before))
