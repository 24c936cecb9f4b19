"""States that are edited from outside: ``optimizer.state`` is the truth, as in torch."""

import copy

import pytest
import torch
from cases import (
    AFTER_LOADING,
    KINDS_AND_BACKENDS,
    every_kind_and_backend,
    every_optimizer,
    give_gradients,
    kinds,
    model,
)
from options import LR, STATEFUL
from oracles import oracle_class
from pairs import SCALARS, Pair, close
from thinning import every_pair_but

import fusedopt

flat_or_not = pytest.mark.parametrize("flatten", [False, True], ids=["in place", "flatten"])


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


TO_STEPS = ["step", "step anew", "equal step"]
EDITS = ["zero", "fill one", "replace", "other strides", "replace .data", "swap", "share", *TO_STEPS]


@every_pair_but("name")
@pytest.mark.parametrize(
    ("name", "backend", "edit"),
    # SGD counts no steps.
    [(*of, edit) for of in KINDS_AND_BACKENDS for edit in EDITS if "SGD" not in of or edit not in TO_STEPS],
    indirect=["backend"],
)
@flat_or_not
def test_state_edited_from_outside(name, edit, flatten, backend, device):
    change = edits(name)[edit]
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
def test_values_in_other_memory(name, device):
    """``value.data = ...`` on large parameters, a transposed one among them; step counts stay."""
    pair = Pair(name, None, "direct", device=device)
    pair.step(2)
    for optimizer in (pair.opt, pair.oracle):
        for state in optimizer.state.values():
            for key in state.keys() - SCALARS - {"step"}:
                state[key].data = 0.5 * state[key]
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
