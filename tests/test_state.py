"""State: checkpoints in both directions, copies, pickles, small files."""

import copy
import io
import pickle

import pytest
import torch
from cases import AFTER_LOADING, every_kind_and_backend, every_optimizer, give_gradients, model
from options import LR, STATEFUL
from oracles import oracle_class
from pairs import SCALARS, Pair, assert_same, close, snapshot
from thinning import every_pair

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


@every_pair
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


@every_pair
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
    """Before, at and after the first gradient: the same keys, dtypes, shapes, strides and devices; but numbers stay on
    the host, where torch's ASGD has its own on the GPU."""
    pair = Pair(name, device=device, start=0)
    for _ in range(6):
        assert [p in pair.opt.state for p in pair.ours] == [p in pair.oracle.state for p in pair.theirs]
        for p, q in zip(pair.ours, pair.theirs):
            ours, theirs = pair.opt.state.get(p, {}), pair.oracle.state.get(q, {})
            assert list(ours) == list(theirs)
            for key, s in ours.items():
                where = torch.device("cpu") if key in ("step", *SCALARS) else theirs[key].device
                assert (s.dtype, s.shape, s.device) == (theirs[key].dtype, theirs[key].shape, where)
                # torch's SGD clones the first gradient, and Rprop fills its like: with its strides, whatever they are.
                like = p if key in ("momentum_buffer", "step_size") else theirs[key]
                assert s.dim() == 0 or s.stride() == like.stride() or has_gaps(p)
        pair.step()


def has_gaps(p):
    return not torch.ops.aten.is_non_overlapping_and_dense(p)


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
