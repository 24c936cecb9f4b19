"""States that are moved away between steps, to make room on a GPU: their memory is free then, as with torch.optim."""

import copy
import gc

import pytest
import torch
from options import LR
from thinning import every_value
from torch.multiprocessing.reductions import StorageWeakRef

import fusedopt

pytestmark = pytest.mark.usefixtures("needs_triton")

STEPS, MOVED = 4, 1


def replace(state, key):
    state[key] = state[key].to("cpu", copy=True)


def replace_data(state, key):
    state[key].data = state[key].data.to("cpu", copy=True)


def delete_first(state, key):
    value = state.pop(key).to("cpu", copy=True)
    state[key] = value


WAYS = pytest.mark.parametrize("move", [replace, replace_data, delete_first])
FORMS = pytest.mark.parametrize(
    "settings",
    [{}, {"state_dtype": "8bit"}, {"ema_decay": 0.9, "max_grad_norm": 0.5}, {"master": "split"}],
    ids=["plain", "8bit", "ema", "split"],
)


def parameters(device, settings):
    generator = torch.Generator().manual_seed(0)
    dtype = torch.bfloat16 if "master" in settings else torch.float32
    # One that 8 bits are kept of.
    shapes = (3, 33), (130, 33), (7,)
    return [torch.nn.Parameter(torch.randn(s, generator=generator).to(device, dtype)) for s in shapes]


def give(made, number, without=None):
    generator = torch.Generator().manual_seed(number)
    for k, p in enumerate(made.param_groups[0]["params"]):
        g = torch.randn(p.shape, generator=generator).to(p)
        p.grad = None if k == without else g


def step(made, number, without=None):
    give(made, number, without)
    made.step()


def buffers(made):
    """The memory of the states."""
    spaces = {id(place.space): place.space for place in made._engine.places.values()}.values()
    return [StorageWeakRef(x.untyped_storage()) for s in spaces for key, x in s.buffers.items() if key != "ema"]


def all_equal(a, b):
    return all(map(torch.equal, a.param_groups[0]["params"], b.param_groups[0]["params"]))


@every_value
@WAYS
@FORMS
def test_memory_of_states_that_move_is_free(move, settings, device):
    made, still = (fusedopt.AdamW(parameters(device, settings), lr=LR, backend="triton", **settings) for _ in range(2))
    for number in range(STEPS):
        step(made, number)
        step(still, number)
        if number == MOVED:
            memory = buffers(made)
            assert memory and not any(x.expired() for x in memory)
            for state in made.state.values():
                for key in list(state):
                    move(state, key)
            gc.collect()
            assert all(x.expired() for x in memory)
            for p, state in made.state.items():
                for key in state.keys() - {"step"}:
                    state[key].data = state[key].data.to(p.device)
    assert all_equal(made, still)
    for mine, theirs in zip(made.state.values(), still.state.values()):
        assert mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)


def test_some_move(device):
    """One state of one parameter: what the others lie in stays, and so do they."""
    made, still = (fusedopt.AdamW(parameters(device, {}), lr=LR, backend="triton") for _ in range(2))
    for number in range(STEPS):
        step(made, number)
        step(still, number)
        if number == MOVED:
            first = made.state[made.param_groups[0]["params"][0]]
            others = [made.state[p]["exp_avg"] for p in made.param_groups[0]["params"][1:]]
            first["exp_avg"] = first["exp_avg"].clone()
    assert all_equal(made, still)
    assert all(made.state[p]["exp_avg"] is x for p, x in zip(made.param_groups[0]["params"][1:], others))


def test_who_only_looks_costs_no_plan(device):
    made = fusedopt.AdamW(parameters(device, {}), lr=LR, backend="triton")
    step(made, 0)
    plan, memory = made._engine.plan, buffers(made)
    seen = [{**state} for state in made.state.values()]
    step(made, 1)
    assert made._engine.plan is plan
    assert all(a[key] is b[key] for a, b in zip(seen, made.state.values()) for key in b)
    made.state  # noqa: B018 asked twice, with nothing in between
    made.state  # noqa: B018
    del seen
    step(made, 2)
    assert not any(x.expired() for x in memory)


def test_other_sets_of_gradients(device):
    """What was planned for sets of parameters holds states of its own."""
    made, still = (fusedopt.AdamW(parameters(device, {}), lr=LR, backend="triton") for _ in range(2))
    for number in range(6):
        for one in (made, still):
            step(one, number, without=number % 3)
        if number == 4:
            memory = buffers(made)
            for state in made.state.values():
                for key in state.keys() - {"step"}:
                    replace(state, key)
            gc.collect()
            assert all(x.expired() for x in memory)
            for p, state in made.state.items():
                state.update({key: state[key].to(p.device) for key in state.keys() - {"step"}})
    assert all_equal(made, still)


def test_forms_that_change_behind_other_sets(device):
    """What was planned for sets of parameters has keys of states that are there no more."""
    settings = {"master": "split"}
    made, still = (fusedopt.AdamW(parameters(device, settings), lr=LR, backend="triton", **settings) for _ in range(2))
    for number in range(5):
        for one in (made, still):
            one.master = "split" if number < 3 else None
            step(one, number, without=0 if number == 1 else None)
        made.state  # noqa: B018
    assert all_equal(made, still)


def test_rules_that_ask_for_states(device):
    """Nothing is lent within a step."""

    class Asks(fusedopt.AdamW):
        def rule(self, group):
            assert isinstance(self.state, dict)
            return super().rule(group)

    made, still = (kind(parameters(device, {}), lr=LR, backend="triton") for kind in (Asks, fusedopt.AdamW))
    for number in range(STEPS):
        for one in (made, still):
            one.param_groups[0]["amsgrad"] = number > 1
            step(one, number, without=number % 2)
    assert all_equal(made, still)


@WAYS
def test_moved_between_clip_and_step(move, device):
    """Momentum that no step has written yet is not taken for a first gradient."""
    made, still = (
        fusedopt.SGD(parameters(device, {}), lr=LR, momentum=0.9, dampening=0.5, backend="triton") for _ in range(2)
    )
    for one in (made, still):
        give(one, 0)
        one.clip_grad_norm_(0.5)
    for state in made.state.values():
        move(state, "momentum_buffer")
        state["momentum_buffer"].data = state["momentum_buffer"].data.to(device)
    made.step()
    still.step()
    assert all_equal(made, still)


def test_copies_and_checkpoints_of_what_moved(device):
    made = fusedopt.AdamW(parameters(device, {}), lr=LR, backend="triton")
    step(made, 0)
    for state in made.state.values():
        replace(state, "exp_avg")
    loaded = fusedopt.AdamW(parameters(device, {}), lr=LR, backend="triton")
    loaded.load_state_dict(made.state_dict())
    copied = copy.deepcopy(made)
    for mine, other, theirs in zip(made.state.values(), copied.state.values(), loaded.state.values()):
        assert all(torch.equal(mine[key].cpu(), other[key].cpu()) for key in mine)
        assert all(torch.equal(mine[key].cpu(), theirs[key].cpu()) for key in mine)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="moving to the host changes nothing without a GPU")
def test_a_step_with_states_on_the_host_is_an_error(device):
    made = fusedopt.AdamW(parameters(device, {}), lr=LR, backend="triton")
    step(made, 0)
    for state in made.state.values():
        replace(state, "exp_avg")
    before = [p.detach().clone() for p in made.param_groups[0]["params"]]
    with pytest.raises(RuntimeError, match=r"exp_avg.*is on cpu"):
        step(made, 1)
    assert all(map(torch.equal, before, made.param_groups[0]["params"]))
