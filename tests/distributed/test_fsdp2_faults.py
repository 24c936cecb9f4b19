"""fully_shard with a rank that differs from the others, and what is refused."""

import contextlib

import pytest
import torch
import torch.distributed as dist
from sharding import sharded
from thinning import every_pair
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from training import (
    build_for,
    clip,
    close,
    full,
    loss_of,
    moved,
    net,
    ours,
    same_on_all_ranks,
    theirs,
    train,
    weights,
)

import fusedopt


@pytest.mark.ranks(2)
def test_a_rank_without_gradients():
    model = sharded()
    optimizer = ours(model, skip_nonfinite=True)
    train(model, optimizer, steps=2)
    loss_of(model, 3).backward()
    squares = sum(p.grad._local_tensor.double().square().sum() for p in model.parameters())
    if dist.get_rank() == 1:
        optimizer.zero_grad()
        squares.zero_()
    dist.all_reduce(squares)
    optimizer.step()
    torch.testing.assert_close(optimizer.grad_norm.double(), squares.sqrt(), rtol=1e-6, atol=0)
    same_on_all_ranks([optimizer.grad_norm])


@every_pair
@pytest.mark.ranks(2)
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("settings", [{"max_grad_norm": None}, {}], ids=["skip", "skip and clip"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nonfinite_on_one_rank_skips_on_all(value, settings, backend):
    model = sharded(build_for(backend))
    optimizer = ours(model, skip_nonfinite=True, backend=backend, **settings)
    train(model, optimizer, steps=2)
    states = [{key: full(x).clone() for key, x in optimizer.state[p].items()} for p in model.parameters()]
    before = [w.clone() for w in weights(model)]
    optimizer.zero_grad()
    loss_of(model, 3).backward()
    if dist.get_rank() == 1:
        model.first.weight.grad._local_tensor[0, 0] = value
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert not optimizer.grad_norm.isfinite()
    assert all(map(torch.equal, before, weights(model)))
    optimizer.state_dict()  # has heard of the skipped step
    for p, state in zip(model.parameters(), states):
        assert all(torch.equal(full(optimizer.state[p][key]), x) for key, x in state.items())
    train(model, optimizer, steps=1, start=3)
    assert not all(map(torch.equal, before, weights(model)))
    same_on_all_ranks(weights(model))


@pytest.mark.ranks(2)
@pytest.mark.parametrize("kind", ["torch", "fused", "ours", "ours, unscaled before"])
def test_grad_scaler_with_inf_on_one_rank(kind):
    scaler_class = fusedopt.GradScaler if "ours" in kind else torch.amp.GradScaler
    scaler = scaler_class("cpu", init_scale=64.0, growth_interval=2)
    reference_scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=2)
    model, reference = sharded(), sharded()
    optimizer = ours(model, fused=True) if kind == "fused" else ours(model)
    opt = theirs(reference)
    for number in range(4):
        for m, s, o in ((model, scaler, optimizer), (reference, reference_scaler, opt)):
            o.zero_grad()
            s.scale(loss_of(m, number)).backward()
            if dist.get_rank() == 1 and number == 2:
                m.last.weight.grad._local_tensor[0, 0] = float("inf")
            if o is opt or kind == "torch" or "before" in kind:
                s.unscale_(o)
            if o is opt:
                clip(m)
            s.step(o)
            s.update()
    assert scaler.get_scale() == reference_scaler.get_scale()
    close(weights(model), weights(reference))
    steps = {int(optimizer.state_dict()["state"][k]["step"]) for k in range(3)}
    assert steps == {3}
    same_on_all_ranks(weights(model))


@pytest.mark.ranks(2)
def test_built_before_sharding_warns_once():
    model = net()
    optimizer = ours(model)
    fully_shard(model)
    for number in range(2):
        loss_of(model, number).backward()
        with pytest.warns(UserWarning, match="before fully_shard") if number == 0 else contextlib.nullcontext():
            optimizer.step()
    assert not moved(model)


@pytest.mark.ranks(2)
def test_parameters_swapped_between_steps():
    """As Accelerate does it: the optimizer is built on the plain model, its groups then get the sharded parameters."""
    model = net()
    optimizer = ours(model)
    train(model, optimizer, steps=1, split=lambda x: x)
    optimizer.state.clear()
    names = {p: name for name, p in model.named_parameters()}
    fully_shard(model)
    found = dict(model.named_parameters())
    for group in optimizer.param_groups:
        group["params"] = [found[names[p]] for p in group["params"]]
    reference = net()
    train(reference, theirs(reference), steps=1, split=lambda x: x, before_step=clip)
    fresh = theirs(reference)
    train(model, optimizer, steps=3, start=1)
    train(reference, fresh, steps=3, start=1, split=lambda x: x, before_step=clip)
    close(weights(model), weights(reference))


@pytest.mark.ranks(2)
def test_state_of_another_layout_is_refused():
    model = sharded()
    optimizer = ours(model)
    train(model, optimizer, steps=1)
    p = model.first.weight
    before = [w.clone() for w in weights(model)]
    optimizer.state[p]["exp_avg"] = torch.zeros(p._local_tensor.shape)
    loss_of(model, 1).backward()
    with pytest.raises(RuntimeError, match=r"'exp_avg' of parameter 0 .* must be distributed as the parameter is"):
        optimizer.step()
    assert all(map(torch.equal, before, weights(model)))


@pytest.mark.ranks(2)
def test_values_of_another_layout_are_not_loaded():
    """Their local parts would be taken for other elements where they have the same shape."""
    grid = init_device_mesh("cpu", (2, 1))
    p = nn.Parameter(distribute_tensor(torch.ones(2, 2).bfloat16(), grid, [Shard(0), Replicate()]))
    optimizer = fusedopt.AdamW([p], lr=0.1, master="fp32", state_dtype=torch.float32, ema_decay=0.9)
    p.grad = torch.ones_like(p)
    optimizer.step()
    values = torch.arange(4.0).view(2, 2)
    loads = {
        "states": lambda x: optimizer.load_state_dict(with_state("exp_avg", x)),
        "masters in states": lambda x: optimizer.load_state_dict(with_state("master", x)),
        "masters": lambda x: optimizer.load_master_state_dict({0: x}),
        "averages": lambda x: optimizer.load_ema_state_dict({0: x}),
    }

    def with_state(key, value):
        saved = optimizer.state_dict()
        return {**saved, "state": {0: {**saved["state"][0], key: value}}}

    def everything():
        return [full(x).clone() for x in (p, *optimizer.state[p].values(), *optimizer.ema_parameters())]

    before = everything()
    elsewhere = distribute_tensor(values, grid, [Replicate(), Shard(0)])
    for name, load in loads.items():
        # Averages are copied by torch, which redistributes them.
        for value in [values] if name == "averages" else [values, elsewhere]:
            with pytest.raises(ValueError, match=r"is a (DTensor|Tensor).* the parameter .*a (Parameter|DTensor)"):
                load(value)
            assert all(map(torch.equal, before, everything()))
        load(distribute_tensor(values, grid, [Shard(0), Replicate()]))
        before = everything()
    optimizer.load_ema_state_dict({0: elsewhere * 2})
    close([full(optimizer.ema_parameters()[0])], [values * 2])


@pytest.mark.ranks(2)
def test_flat_gradients_are_refused():
    model = sharded()
    with pytest.raises(RuntimeError, match="flat_grads=True cannot keep the gradients of distributed parameters"):
        ours(model, flat_grads=True)
    optimizer = ours(model)
    with pytest.raises(RuntimeError, match="flat_grads=True cannot keep the gradients of distributed parameters"):
        optimizer.flat_grads = True
    assert not optimizer.flat_grads


@pytest.mark.ranks(2)
def test_clip_group_over_ranks_that_share_the_parameters_is_refused():
    """Every square would be counted twice."""
    model = sharded()
    optimizer = ours(model, clip_group="world")
    loss_of(model, 0).backward()
    with pytest.raises(RuntimeError, match="clip_group='world' connects ranks over which the parameters"):
        optimizer.step()
    assert not moved(model)
