"""State: checkpoints in both directions, copies, pickles, small files, and states edited from outside."""

import copy
import io
import pickle

import pytest
import torch
from cases import AFTER_LOADING, every_kind_and_backend, every_optimizer, give_gradients, kinds, model
from options import LR, STATEFUL
from oracles import oracle_class
from pairs import Pair, assert_same, close, snapshot

import fusedopt

flat_or_not = pytest.mark.parametrize("flatten", [False, True], ids=["in place", "flatten"])


def through_file(state_dict):
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


CARRIERS = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda state_dict: pickle.loads(pickle.dumps(state_dict)),
    "file": through_file,
}


def continuation(cls, source, params, options, **settings):
    """A fresh optimizer over copies of parameters, at the same point of its course."""
    params = [torch.nn.Parameter(p.detach().clone()) for p in params]
    middle = len(params) // 2
    optimizer = cls([{"params": params[:middle]}, {"params": params[middle:]}], **options, **settings)
    optimizer.load_state_dict(source)
    return params, optimizer


@every_kind_and_backend
@pytest.mark.parametrize("carrier", CARRIERS)
@flat_or_not
def test_checkpoints_go_both_ways_in_mid_training(name, carrier, flatten, backend, device):
    pair = Pair(name, None, "tiny", device=device, backend=backend, flatten=flatten)
    pair.step(3)
    ours, theirs = fusedopt.registry[name], oracle_class(name)
    carry, options = CARRIERS[carrier], {"lr": 9.0, **STATEFUL[name]}  # an lr that loading must replace
    saved, expected = carry(pair.opt.state_dict()), carry(pair.oracle.state_dict())
    copies = [
        continuation(ours, saved, pair.ours, options, backend=backend, flatten=flatten),
        continuation(ours, expected, pair.ours, options, backend=backend, flatten=flatten),
        continuation(theirs, saved, pair.ours, options, foreach=False),
    ]
    for _ in range(3):
        for params, optimizer in copies:
            give_gradients(params, pair.number, plain=True)
            optimizer.step()
        pair.step()
    pair.check()
    for params, optimizer in copies:
        close(params, pair.theirs, AFTER_LOADING[name])
        for group, group_expected in zip(optimizer.state_dict()["param_groups"], pair.oracle.param_groups):
            assert group["lr"] == group_expected["lr"]


@every_kind_and_backend
@flat_or_not
def test_loading_into_the_same_optimizer_goes_back(name, flatten, backend, device):
    pair = Pair(name, None, "tiny", device=device, groups=False, backend=backend, flatten=flatten)
    pair.step(3)
    saved = copy.deepcopy(pair.opt.state_dict())
    values = [p.detach().clone() for p in pair.ours]
    pair.step(2)
    first = snapshot(pair.opt)
    pair.opt.load_state_dict(saved)
    with torch.no_grad():
        for p, value in zip(pair.ours, values):
            p.copy_(value)
    for number in (7, 8):
        give_gradients(pair.ours, number)
        pair.opt.step()
    # The same kernels on the same numbers.
    assert_same(first, snapshot(pair.opt))


@every_kind_and_backend
@pytest.mark.parametrize("carry", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
@flat_or_not
def test_copies_of_an_optimizer_go_on_by_themselves(name, carry, flatten, backend, device):
    pair = Pair(name, None, "tiny", device=device, groups=False, backend=backend, flatten=flatten, max_grad_norm=4.0)
    pair.step(2)
    params, optimizer = carry((pair.ours, pair.opt))
    assert type(optimizer) is type(pair.opt)
    assert all(p is q for p, q in zip(optimizer.param_groups[0]["params"], params))
    before = snapshot(optimizer)
    pair.step(2)
    assert_same(before, snapshot(optimizer))
    for number in (6, 7):
        give_gradients(params, number)
        optimizer.step()
    pair.check()
    close(params, pair.theirs, 1e-12)


@every_optimizer
@flat_or_not
def test_files_hold_what_they_should_and_no_more(name, flatten):
    """A state, or a flattened parameter, is a view of a large buffer; its file must not be that large."""
    params = [torch.nn.Parameter(torch.randn(100, 10)) for _ in range(30)]
    optimizer = fusedopt.registry[name](params, **STATEFUL[name], flatten=flatten)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    states = optimizer.state_dict()["state"]
    for tensor in [params[3], *states[3].values()]:
        for save in (torch.save, pickle.dump):
            file = io.BytesIO()
            save(tensor.detach(), file)
            # torch's own overhead is below 2 KB.
            assert file.tell() < tensor.numel() * tensor.element_size() + 2000
    whole = io.BytesIO()
    torch.save(optimizer.state_dict(), whole)
    elements = sum(s.numel() for state in states.values() for s in state.values())
    # 400 bytes of names and alignment per tensor, and the groups.
    assert whole.tell() < 4 * elements + 400 * sum(map(len, states.values())) + 5000


@every_optimizer
def test_states_are_created_as_by_torch(name, device):
    """Before, at and after the first gradient: the same keys, dtypes, shapes, strides and devices."""
    pair = Pair(name, device=device, start=0)
    for _ in range(6):
        assert [p in pair.opt.state for p in pair.ours] == [p in pair.oracle.state for p in pair.theirs]
        for p, q in zip(pair.ours, pair.theirs):
            ours, theirs = pair.opt.state.get(p, {}), pair.oracle.state.get(q, {})
            assert list(ours) == list(theirs)
            for key, s in ours.items():
                assert (s.dtype, s.shape, s.device) == (theirs[key].dtype, theirs[key].shape, theirs[key].device)
                # torch's SGD clones the first gradient, and Rprop fills its like: with its strides, whatever they are.
                like = p if key in ("momentum_buffer", "step_size") else theirs[key]
                assert s.dim() == 0 or s.stride() == like.stride() or has_gaps(p)
        pair.step()


def has_gaps(p):
    return not torch.ops.aten.is_non_overlapping_and_dense(p)


def edits(name):
    """What a user may do to ``state[p]``, on both sides."""
    keys = [key for key in Pair(name).oracle_keys() if key != "step"]

    def swap(state, other):
        for key in keys:
            state[key], other[key] = other[key], state[key]

    found = {
        "zero": lambda state, other: [state[key].zero_() for key in keys],
        "fill one": lambda state, other: state[keys[0]].fill_(0.25),
        "replace": lambda state, other: state.update({key: torch.full_like(state[key], 0.1) for key in keys}),
        "other strides": lambda state, other: state.update({key: state[key].t().contiguous().t() for key in keys}),
        "replace .data": lambda state, other: [setattr(v, "data", v.data.clone()) for v in state.values()],
        "swap": swap,
        "share": lambda state, other: [state[key].share_memory_() for key in keys if state[key].is_cpu],
    }
    if "step" in Pair(name).oracle_keys():
        found["step"] = lambda state, other: state["step"].fill_(7.0)
        found["step anew"] = lambda state, other: state.update(step=torch.tensor(7.0))
        found["equal step"] = lambda state, other: state.update(step=state["step"].clone())
    return found


EDITS = ["zero", "fill one", "replace", "other strides", "replace .data", "swap", "share", "step", "step anew"]
EDITS.append("equal step")


@every_kind_and_backend
@pytest.mark.parametrize("edit", EDITS)
@flat_or_not
def test_state_edited_from_outside(name, edit, flatten, backend, device):
    change = edits(name).get(edit)
    if change is None:
        return  # SGD counts no steps
    for kind in kinds(backend, device):
        pair = Pair(name, None, kind, device=device, backend=backend, flatten=flatten)
        for optimizer, params in ((pair.opt, pair.ours), (pair.oracle, pair.theirs)):
            # A twin of the same shape, to swap with.
            params.append(torch.nn.Parameter(torch.ones_like(params[1])))
            optimizer.add_param_group({"params": [params[-1]]})
        pair.step(2)
        for _ in range(2):
            for optimizer, params in ((pair.opt, pair.ours), (pair.oracle, pair.theirs)):
                change(optimizer.state[params[1]], optimizer.state[params[-1]])
            # What was put there is there, before the next step too.
            pair.check()
            pair.step(2)
            pair.check()


@every_optimizer
def test_exchanged_states_in_a_loaded_checkpoint(name, device):
    """The state_dict's tensors are live ones; a loaded permutation of them reads each before it is written."""
    results = []
    for cls in (fusedopt.registry[name], oracle_class(name)):
        params = [torch.nn.Parameter(torch.ones(6, dtype=torch.float64, device=device)) for _ in range(10)]
        optimizer = cls(params, lr=LR, **STATEFUL[name])
        for number in range(4):
            if number == 2:
                saved = optimizer.state_dict()
                saved["state"] = {k: saved["state"][(k + 1) % 10] for k in range(10)}
                optimizer.load_state_dict(saved)
            give_gradients(params, 5 + number, plain=True)
            optimizer.step()
        results.append(params)
    close(*results, AFTER_LOADING[name])


@every_optimizer
def test_old_checkpoints_with_a_number_for_a_step(name, device):
    """torch before 1.12 saved ``step`` as an int."""
    if name == "SGD":
        return
    pair = Pair(name, None, "tiny", device=device, groups=False)
    pair.step(6)
    for optimizer in (pair.opt, pair.oracle):
        old = copy.deepcopy(optimizer.state_dict())
        for state in old["state"].values():
            state["step"] = int(state["step"])
        optimizer.load_state_dict(old)
    pair.step(2)
    pair.check(AFTER_LOADING[name])


@every_kind_and_backend
def test_foreign_entries_in_state(name, backend, device):
    pair = Pair(name, None, "tiny", device=device, groups=False, backend=backend)
    pair.step(5)
    for optimizer, params in ((pair.opt, pair.ours), (pair.oracle, pair.theirs)):
        optimizer.state["test"] = 1
        optimizer.state[params[1]]["mine"] = "text"
    pair.step(2)
    assert pair.opt.state["test"] == 1
    assert pair.opt.state_dict()["state"][1]["mine"] == "text"
    close(pair.ours, pair.theirs, 1e-12)


@every_kind_and_backend
def test_failed_loading_changes_nothing(name, backend, device):
    pair = Pair(name, None, "tiny", device=device, backend=backend, max_grad_norm=3.0)
    pair.step(3)
    before = snapshot(pair.opt)
    states = [dict(pair.opt.state.get(p, {})) for p in pair.ours]
    other = fusedopt.registry[name](model("tiny", device=device)[:2], lr=5.0)
    wrong = pair.opt.state_dict()
    wrong["param_groups"][0]["params"] = wrong["param_groups"][0]["params"][:-1]
    for bad in (other.state_dict(), wrong, {}, {"state": {}}):
        with pytest.raises((ValueError, KeyError)):
            pair.opt.load_state_dict(bad)
    assert_same(before, snapshot(pair.opt))
    assert all(pair.opt.state[p][key] is s for p, state in zip(pair.ours, states) for key, s in state.items())
    pair.step(2)
    pair.check()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_states_of_another_dtype_are_kept(dtype, backend, device):
    """Wider states than the parameter's, put there by hand: kept, and used at their precision."""
    params = [p for p in model("tiny", torch.bfloat16, device) if p.numel()]
    optimizer = fusedopt.Adam(params, lr=LR, backend=backend)
    exact = [torch.nn.Parameter(p.detach().double()) for p in params]
    oracle = torch.optim.Adam(exact, lr=LR, foreach=False)
    for p in params:
        zeros = torch.zeros(p.shape, dtype=dtype, device=device)
        optimizer.state[p].update(step=torch.tensor(0.0), exp_avg=zeros, exp_avg_sq=zeros.clone())
    for number in (4, 5, 6, 8):
        give_gradients(params, number)
        for p, q in zip(params, exact):
            q.grad = None if p.grad is None else p.grad.double()
        optimizer.step()
        oracle.step()
    for p, q in zip(params, exact):
        assert optimizer.state[p]["exp_avg"].dtype is dtype
        # float32 rounds at 6e-8, bfloat16 at 2e-3, four times.
        error = (optimizer.state[p]["exp_avg_sq"].double() - oracle.state[q]["exp_avg_sq"]).abs().max()
        assert error < (1e-6 if dtype is torch.float32 else 2e-2) * oracle.state[q]["exp_avg_sq"].max()
    saved = optimizer.state_dict()
    # Without the setting loading rounds them to the parameter's dtype, as in torch.
    again = fusedopt.Adam(params, lr=LR, backend=backend, state_dtype=dtype)
    again.load_state_dict(copy.deepcopy(saved))
    for state, loaded in zip(optimizer.state.values(), again.state.values()):
        for key, value in state.items():
            assert loaded[key].dtype is value.dtype and torch.equal(loaded[key], value), key


def test_loaded_states_take_the_memory_of_those_before(backend, device):
    """Whoever holds on to addresses, a CUDA graph for one, may go on."""
    params = model("tiny", torch.float32, device)
    optimizer = fusedopt.Adam(params, lr=LR, backend=backend)
    addresses = []
    for number in range(4, 8):
        give_gradients(params, number, plain=True)
        optimizer.step()
        if number == 5:
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        else:
            states = (optimizer.state[p] for p in params if p in optimizer.state)
            addresses.append([state["exp_avg"].data_ptr() for state in states])
    assert addresses[0] == addresses[1] == addresses[2]
