"""FullyShardedDataParallel (FSDP1): parameters are plain pieces of a flat one; only ``clip_group`` says so."""

import warnings

import pytest
import torch
import torch.distributed as dist
from thinning import every_value
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from training import Net, clip, close, loss_of, net, ours, same_on_all_ranks, single_process, theirs, train

import fusedopt

STEPS = 3


def sharded(use_orig_params=True, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch would rather see fully_shard used
        return FullyShardedDataParallel(
            net(),
            auto_wrap_policy=ModuleWrapPolicy({torch.nn.Linear}),
            use_orig_params=use_orig_params,
            device_id=torch.device("cpu"),
            **options,
        )


def one_group(model, cls=fusedopt.AdamW, **settings):
    """Flat parameters mix matrices and biases."""
    return cls(model.parameters(), lr=1e-2, weight_decay=0.1, eps=1e-4, **settings)


def weights(model):
    with FullyShardedDataParallel.summon_full_params(model):
        return [p.detach().clone() for p in model.module.parameters()]


def reference():
    model = net()
    optimizer = one_group(model, torch.optim.AdamW)
    train(model, optimizer, STEPS, split=lambda x: x, before_step=clip)
    return list(model.parameters())


both_forms = pytest.mark.parametrize("use_orig_params", [True, False], ids=["original", "flat"])


@every_value
@pytest.mark.ranks(2)
@both_forms
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_clipped_by_the_model(use_orig_params, backend):
    """Either backend with one form: to both, the pieces are plain tensors."""
    model = sharded(use_orig_params)
    optimizer = one_group(model, backend=backend)
    train(model, optimizer, STEPS, before_step=lambda model: model.clip_grad_norm_(0.5))
    close(weights(model), reference())


@every_value
@pytest.mark.ranks(2)
@both_forms
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_clipped_over_the_world(use_orig_params, backend):
    """Chosen as above."""
    model = sharded(use_orig_params)
    optimizer = one_group(model, backend=backend, max_grad_norm=0.5, clip_group="world")
    train(model, optimizer, STEPS)
    close(weights(model), reference())
    same_on_all_ranks([optimizer.grad_norm])


@pytest.mark.ranks(2)
@both_forms
@pytest.mark.parametrize("act", ["max_grad_norm", "skip_nonfinite", "clip_grad_norm_", "GradScaler"])
def test_a_part_of_the_norm_is_refused(use_orig_params, act):
    model = sharded(use_orig_params)
    before = weights(model)
    settings = {"max_grad_norm": 0.5} if act == "max_grad_norm" else {}
    optimizer = one_group(model, skip_nonfinite=act == "skip_nonfinite", **settings)
    scaler = fusedopt.GradScaler("cpu")
    loss = loss_of(model, 0)
    (scaler.scale(loss) if act == "GradScaler" else loss).backward()
    with pytest.raises(RuntimeError, match="this rank's part of the gradients"):
        if act == "clip_grad_norm_":
            optimizer.clip_grad_norm_(0.5)
        elif act == "GradScaler":
            scaler.step(optimizer)
        else:
            optimizer.step()
    assert all(map(torch.equal, before, weights(model)))


@pytest.mark.ranks(2)
@both_forms
def test_averages_are_not_put_into_pieces(use_orig_params):
    """What forward has gathered stays there, and nothing says to what module a piece belongs."""
    model = sharded(use_orig_params)
    optimizer = one_group(model, ema_decay=0.9)
    train(model, optimizer, 1)
    before = weights(model)
    with pytest.raises(RuntimeError, match="use fully_shard"), optimizer.ema_parameters():
        pass
    close(weights(model), before, 0.0)
    train(model, optimizer, 1, start=1)


@pytest.mark.ranks(2)
@both_forms
def test_optimizer_state_goes_both_ways(use_orig_params):
    """Through FSDP's own optim_state_dict: ours, torch's and ours again. The reference goes the same way with torch's
    alone: with use_orig_params=True, torch 2.13 itself does not train on as if it had not been interrupted."""

    def train_with(*classes):
        model, state = sharded(use_orig_params), None
        for number, cls in enumerate(classes):
            inside = cls is fusedopt.AdamW
            optimizer = one_group(model, cls, **({"max_grad_norm": 0.5, "clip_group": "world"} if inside else {}))
            if state is not None:
                state = FullyShardedDataParallel.optim_state_dict_to_load(model, optimizer, state)
                optimizer.load_state_dict(state)
            before = None if inside else lambda model: model.clip_grad_norm_(0.5)
            train(model, optimizer, 1, start=number, before_step=before)
            state = FullyShardedDataParallel.optim_state_dict(model, optimizer)
        return weights(model)

    ours, torchs = fusedopt.AdamW, torch.optim.AdamW
    expected = train_with(torchs, torchs, torchs)
    close(train_with(ours, torchs, ours), expected)
    if not use_orig_params:
        close(expected, reference())


@pytest.mark.ranks(4)
def test_hybrid_sharding_clips_over_one_copy():
    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    model = sharded(sharding_strategy=ShardingStrategy.HYBRID_SHARD, device_mesh=grid)
    optimizer = one_group(model, max_grad_norm=0.5, clip_group=grid["shard"])
    train(model, optimizer, STEPS)
    close(weights(model), reference())
    same_on_all_ranks([optimizer.grad_norm])


@pytest.mark.ranks(2)
def test_scaler_with_inf_on_one_rank():
    model = sharded()
    optimizer, scaler = one_group(model), ShardedGradScaler("cpu", init_scale=8.0)
    optimizer.zero_grad()
    scaler.scale(loss_of(model, 0)).backward()
    before = weights(model)
    if dist.get_rank() == 1:
        next(p.grad for p in model.parameters() if p.grad is not None and p.grad.numel()).view(-1)[0] = float("inf")
    scaler.step(optimizer)
    scaler.update()
    assert all(map(torch.equal, before, weights(model)))
    assert scaler.get_scale() == 4.0


@pytest.mark.ranks(2)
def test_groups_by_original_parameters():
    """With use_orig_params=True groups may be as in any model; some of a rank's parameters are empty."""
    model = sharded(True)
    assert any(p.numel() == 0 for p in model.parameters())
    named = [p for p in model.parameters() if p.numel()]
    assert len(named) < len(list(Net().parameters()))
    optimizer = ours(model, clip_group="world")
    other = sharded(True)
    expected = theirs(other)
    for m, o, before in ((model, optimizer, None), (other, expected, lambda m: m.clip_grad_norm_(0.5))):
        train(m, o, STEPS, before_step=before)
    close(weights(model), weights(other))
    assert len(weights(model)) == len(list(single_process(1).parameters()))
