"""torch.distributed.checkpoint: whoever saved it and on however many ranks, training goes on as if uninterrupted."""

import functools
import itertools

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from sharding import sharded
from thinning import every_pair
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from training import Net, clip, close, full, net, ours, same_on_all_ranks, single_process, theirs, train, weights

import fusedopt

FORMS = {
    "sharded": StateDictOptions(),
    "flattened": StateDictOptions(flatten_optimizer_state_dict=True),
    "full": StateDictOptions(full_state_dict=True, cpu_offload=True),
}
MAKERS = {"ours": ours, "torch": theirs}


def trained(make, world, steps, start=0, loaded=None):
    """A model on ``world`` ranks, and its optimizer, after training. On one rank it is not sharded at all."""
    model = sharded() if world == 2 else net()
    optimizer = make(model)
    if loaded is not None:
        loaded(model, optimizer)
    if world == 1 and dist.get_rank() == 1:
        return model, optimizer
    split = {} if world == 2 else {"split": lambda x: x}
    train(model, optimizer, steps, start, before_step=clip if make is theirs else None, **split)
    return model, optimizer


def save(form, world, model, optimizer, folder):
    if world == 1 and dist.get_rank() == 1:
        return
    state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer, options=FORMS[form])))
    if form == "full":
        if dist.get_rank() == 0:
            torch.save(state, folder / "full")
    else:
        dcp.save(state, checkpoint_id=folder, no_dist=world == 1)


def load(form, world, model, optimizer, folder):
    if world == 1 and dist.get_rank() == 1:
        return
    options = FORMS[form]
    if form == "full":
        there = dist.get_rank() == 0
        state = torch.load(folder / "full") if there else {"model": {}, "optimizer": {}}
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=world == 2)
    else:
        state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer, options=options)))
        dcp.load(state, checkpoint_id=folder, no_dist=world == 1)
    set_model_state_dict(model, state["model"], options=options)
    set_optimizer_state_dict(model, optimizer, state["optimizer"], options=options)


RESUMES = [
    (form, worlds, *makers)
    for form, worlds, *makers in itertools.product(FORMS, [(2, 1), (2, 2), (1, 2)], MAKERS, MAKERS)
    if "ours" in makers
]


@every_pair
@pytest.mark.ranks(2)
@pytest.mark.parametrize(
    ("form", "worlds", "source", "target"),
    [pytest.param(f, w, s, t, id=f"{f}-{s} on {w[0]}-{t} on {w[1]}") for f, w, s, t in RESUMES],
)
def test_resumes_as_if_uninterrupted(form, worlds, source, target, folder):
    """How it was saved, from and to how many ranks, by whose optimizer and for whose: every two of these together."""
    model, optimizer = trained(MAKERS[source], worlds[0], 2)
    save(form, worlds[0], model, optimizer, folder)
    dist.barrier()
    model, optimizer = trained(
        MAKERS[target], worlds[1], 2, start=2, loaded=lambda m, o: load(form, worlds[1], m, o, folder)
    )
    if worlds[1] == 2 or dist.get_rank() == 0:
        # What is restored is exact; the rest is as in test_fsdp2.
        close(weights(model), weights(single_process(4)))
        group = optimizer.param_groups[1]
        assert (group["lr"], group["weight_decay"]) == (1e-2, 0.0)
        assert {int(state["step"]) for state in optimizer.state.values()} == {4}


@pytest.mark.ranks(2)
def test_whole_states_of_distributed_parameters_are_refused():
    _, optimizer = trained(ours, 1, 1)
    states = [optimizer.state_dict()]
    dist.broadcast_object_list(states)
    model, optimizer = trained(ours, 2, 1)
    before = [full(x).clone() for state in optimizer.state.values() for x in state.values()]
    with pytest.raises(ValueError, match="is a Tensor and the parameter a DTensor"):
        optimizer.load_state_dict(states[0])
    assert all(map(torch.equal, before, (full(x) for state in optimizer.state.values() for x in state.values())))


@pytest.mark.ranks(2)
def test_checkpoint_of_ddp_goes_to_fully_shard(folder):
    model = DistributedDataParallel(net())
    optimizer = ours(model)
    train(model, optimizer, 2)
    save("sharded", 2, model, optimizer, folder)
    model, _ = trained(ours, 2, 2, start=2, loaded=lambda m, o: load("sharded", 2, m, o, folder))
    close(weights(model), weights(single_process(4)))


@pytest.mark.ranks(2)
def test_saved_while_training_goes_on(folder):
    """async_save copies first; what the steps after it change is not saved."""
    model, optimizer = trained(ours, 2, 2)
    state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer)))
    group = dist.new_group(backend="gloo")
    future = dcp.async_save(state, checkpoint_id=folder, process_group=group)
    train(model, optimizer, 2, start=2)
    future.result()
    other, _ = trained(ours, 2, 2, start=2, loaded=lambda m, o: load("sharded", 2, m, o, folder))
    close(weights(other), weights(model), 0.0)


@pytest.mark.ranks(2)
@pytest.mark.parametrize("saved", [True, False], ids=["saved", "not saved"])
@pytest.mark.parametrize("first", ["averages", "states"])
def test_averages(first, saved, folder):
    """torch makes states to load into by a step, which neither begins an average nor moves it; where none was saved,
    they begin as the loaded weights."""
    model, optimizer = trained(functools.partial(ours, ema_decay=0.5), 2, 2)
    averages = {"averages": optimizer.ema_state_dict()} if saved else {}
    states = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer)))
    dcp.save(averages | states, checkpoint_id=folder)
    expected = list(map(full, optimizer.ema_parameters() if saved else flattened(optimizer)))

    model = sharded()
    optimizer = ours(model, ema_decay=0.5)
    state = {"averages": optimizer.ema_state_dict()} if saved and first == "averages" else {}
    state |= dict(zip(("model", "optimizer"), get_state_dict(model, optimizer)))
    if saved and first == "states":
        state["averages"] = optimizer.ema_state_dict()
    dcp.load(state, checkpoint_id=folder)
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"])
    if saved:
        optimizer.load_ema_state_dict(state["averages"])
    close(map(full, optimizer.ema_parameters()), expected, 0.0)
    train(model, optimizer, 1, start=2)
    moved = [a + 0.5 * (p - a) for a, p in zip(expected, map(full, flattened(optimizer)))]
    close(map(full, optimizer.ema_parameters()), moved)


@pytest.mark.ranks(2)
def test_averages_that_were_loaded_before_the_states(folder):
    model, optimizer = trained(functools.partial(ours, ema_decay=0.5), 2, 2)
    save("full", 2, model, optimizer, folder)
    dist.barrier()
    averages = optimizer.ema_state_dict()
    expected = list(map(full, optimizer.ema_parameters()))
    model = sharded()
    optimizer = ours(model, ema_decay=0.5)
    optimizer.load_ema_state_dict(averages)
    load("full", 2, model, optimizer, folder)
    close(map(full, optimizer.ema_parameters()), expected, 0.0)


def flattened(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


def plain_and_sharded():
    return {"plain": net, "sharded": lambda: fully_shard(net())}


@pytest.mark.ranks(2)
@pytest.mark.parametrize("where", ["plain", "sharded"])
@pytest.mark.parametrize("name", sorted(fusedopt.registry))
def test_keys_are_torchs(name, where):
    """One key more, or another order of kinds, and checkpoints would not interchange."""
    theirs_cls = getattr(torch.optim, name, None)
    if theirs_cls is None or (name, where) == ("Rprop", "sharded"):  # torch's own cannot step distributed parameters
        return
    options = {"lr": 1e-2} | ({"momentum": 0.9} if name in ("SGD", "RMSprop") else {})
    found = []
    for cls, settings in ((fusedopt.registry[name], {"max_grad_norm": 1.0}), (theirs_cls, {})):
        model = plain_and_sharded()[where]()
        optimizer = cls(model.parameters(), **options, **settings)
        train(model, optimizer, 1)
        found.append(get_optimizer_state_dict(model, optimizer))
    mine, other = found
    assert [list(group) for group in mine["param_groups"]] == [list(group) for group in other["param_groups"]]
    assert mine["state"].keys() == other["state"].keys()
    for key, state in mine["state"].items():
        assert list(state) == list(other["state"][key])
        for name, value in state.items():
            expected = other["state"][key][name]
            assert (type(value), value.dtype, value.shape) == (type(expected), expected.dtype, expected.shape)


@pytest.mark.ranks(2)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("where", ["plain", "sharded"])
def test_asking_for_the_state_early_changes_nothing(where, dtype):
    """torch makes the states exist by a step with lr 0 and zero gradients."""
    model = plain_and_sharded()[where]().to(dtype)
    before = [w.clone() for w in weights(model)]
    optimizer = ours(model)
    get_optimizer_state_dict(model, optimizer)
    assert all(map(torch.equal, before, weights(model)))
    assert len(optimizer.state) == len(before)


class Larger(Net):
    """One matrix of more elements than what is kept in float32 where others have 8 bits."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(7, 705), nn.LayerNorm(705), nn.Linear(705, 5)


STORED = [{"state_dtype": torch.float32}, {"state_dtype": "8bit"}, {"master": "fp32"}, {"master": "kahan"}]


@pytest.mark.ranks(2)
@pytest.mark.parametrize(
    ("settings", "form"),
    [*((settings, "sharded") for settings in STORED), *((settings, "flattened") for settings in STORED[1:3])],
    ids=str,
)
def test_what_is_stored_beside_bfloat16_parameters_comes_back_exactly(settings, form, folder):
    def build():
        model = fully_shard(net(Larger).bfloat16())
        return model, ours(model, **settings)

    def split(x):
        return x.chunk(2)[dist.get_rank()].bfloat16()

    model, optimizer = build()
    train(model, optimizer, 2, split=split)
    save(form, 2, model, optimizer, folder)
    other, optimizer_of_other = build()
    load(form, 2, other, optimizer_of_other, folder)
    for m, o in ((model, optimizer), (other, optimizer_of_other)):
        train(m, o, 1, start=2, split=split)
    close(weights(other), weights(model), 0.0)
    for p, q in zip(model.parameters(), other.parameters()):
        state, restored = optimizer.state[p], optimizer_of_other.state[q]
        assert sorted(state) == sorted(restored)
        assert all(restored[key].dtype is value.dtype for key, value in state.items())
        if "8bit" not in settings.values():  # whose scales are computed anew, and may be rounded otherwise
            assert all(torch.equal(full(restored[key]), full(value)) for key, value in state.items())
    same_on_all_ranks(weights(other))


@pytest.mark.ranks(2)
def test_masters_in_parts_cannot_be_flattened(folder):
    """torch puts flat states together by the keys of optimizer.state, and state_dict() shows other ones."""
    model = fully_shard(net().bfloat16())
    optimizer = ours(model, master="kahan")

    def split(x):
        return x.chunk(2)[dist.get_rank()].bfloat16()

    train(model, optimizer, 2, split=split)
    save("flattened", 2, model, optimizer, folder)
    other = fully_shard(net().bfloat16())
    optimizer_of_other = ours(other, master="kahan")
    with pytest.raises(TypeError, match="leave flatten_optimizer_state_dict out, or load with master='fp32'"):
        load("flattened", 2, other, optimizer_of_other, folder)
    optimizer_of_other.master = "fp32"
    optimizer_of_other.state.clear()
    load("flattened", 2, other, optimizer_of_other, folder)
    optimizer_of_other.master = "kahan"
    for m, o in ((model, optimizer), (other, optimizer_of_other)):
        train(m, o, 1, start=2, split=split)
    close(weights(other), weights(model), 0.0)
