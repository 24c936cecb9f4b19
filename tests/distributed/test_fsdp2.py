"""fully_shard: parameters are DTensors over one mesh; shards are even, uneven and empty."""

import gc
import inspect

import pytest
import torch
import torch.distributed as dist
from oracles import oracle_class
from sharding import counted, sharded
from thinning import ALL, every_pair
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
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
    single_process,
    theirs,
    train,
    weights,
)

import fusedopt


@every_pair
@pytest.mark.ranks(2)
@pytest.mark.parametrize("set_to_none", [True, False], ids=["none", "zero"])
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("reshard", [True, False], ids=["reshard", "keep"])
def test_trains_as_one_process_does(reshard, accumulate, set_to_none):
    """Each two of these three together."""
    model = sharded(reshard_after_forward=reshard)
    parts = [p._local_tensor.numel() for p in model.parameters()]
    assert 0 in parts or dist.get_rank() == 0
    optimizer = ours(model)
    with counted(optimizer) as calls:
        train(model, optimizer, accumulate=accumulate, set_to_none=set_to_none)
    assert calls == [2] * 3  # one sum of squares, one found_inf
    # float32 sums over the batch are taken in another order: 1e-7 of a gradient, of which Adam makes 1e-2 at most.
    close(weights(model), weights(single_process(accumulate=accumulate)))
    assert moved(model)
    same_on_all_ranks([*weights(model), optimizer.grad_norm])


class Even(torch.nn.Module):
    """Whose shards are even, as most models' are: none is padded anywhere."""

    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(7, 32)
        self.last = torch.nn.Linear(32, 6)
        self.gain = torch.nn.Parameter(torch.full((2,), 3.0))

    def forward(self, x):
        return self.gain.mean() * self.last(torch.tanh(self.first(x)))[:, :5]


@pytest.mark.ranks(2)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_even_shards(backend):
    """Resumed in the middle: states of a rank, taken for the whole, would fit as well and be wrong."""
    model = fully_shard(net(Even))
    for p in model.parameters():
        assert 2 * p._local_tensor.numel() == p.numel()
    optimizer = ours(model, backend=backend)
    train(model, optimizer, steps=2)
    state = get_optimizer_state_dict(model, optimizer)
    optimizer = ours(model, backend=backend)
    set_optimizer_state_dict(model, optimizer, state)
    train(model, optimizer, steps=1, start=2)
    close(weights(model), weights(single_process(build=Even)))
    assert moved(model)


IN_KERNELS = ["ASGD", "RMSprop", "SGD", "StableAdamW"]
"""What the interpreter takes: numbers and averages of their own, most states, none, a mean over whole parameters."""


def options_of(name):
    """Well-conditioned ones: with a tiny eps the order of additions over ranks shows in quotients of tiny numbers."""
    accepted = inspect.signature(fusedopt.registry[name]).parameters
    options = {"lr": 1e-2, "weight_decay": 0.1, "eps": 1e-3} | ({"momentum": 0.9} if name == "SGD" else {})
    return {key: value for key, value in options.items() if key in accepted}


@pytest.mark.ranks(2)
@pytest.mark.parametrize(
    ("name", "backend"),
    [(name, "torch") for name in sorted(fusedopt.registry)]
    + [(name, "triton") for name in (sorted(fusedopt.registry) if ALL else IN_KERNELS)],
)
def test_every_optimizer(name, backend):
    model, reference = sharded(build_for(backend)), net(build_for(backend))
    optimizer = fusedopt.registry[name](model.parameters(), **options_of(name), max_grad_norm=0.5, backend=backend)
    oracle = oracle_class(name)(reference.parameters(), **options_of(name), foreach=False)
    train(model, optimizer, steps=2)
    train(reference, oracle, steps=2, split=lambda x: x, before_step=clip)
    close(weights(model), weights(reference))
    assert moved(model)
    for p, q in zip(model.parameters(), reference.parameters()):
        state = optimizer.state[p]
        assert sorted(state) == sorted(oracle.state[q])
        for key, value in state.items():
            close([full(value)], [oracle.state[q][key]], 1e-6, "states")
            if value.dim():
                assert (value.shape, value.placements) == (p.shape, p.placements)
                assert value._local_tensor.storage_offset() == 0


@pytest.mark.ranks(2)
def test_fsdp_still_gathers_from_the_updated_memory():
    model = sharded()
    train(model, ours(model), steps=3)
    for module in (model, model.first):
        for param in module._get_fsdp_state()._fsdp_param_group.fsdp_params:
            shard = param.sharded_param._local_tensor
            assert not shard.numel() or shard.data_ptr() == param._sharded_param_data.data_ptr()
    reference = single_process(steps=3)
    loss = loss_of(model, 9).detach()
    dist.all_reduce(loss)
    close([loss / 2], [loss_of(reference, 9, split=lambda x: x)])


@pytest.mark.ranks(2)
def test_mixed_precision():
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model, reference = sharded(mp_policy=policy), sharded(mp_policy=policy)
    train(model, ours(model))
    train(reference, theirs(reference), before_step=clip)
    close(weights(model), weights(reference))
    assert all(p.dtype is torch.float32 for p in model.parameters())


@pytest.mark.ranks(2)
def test_cpu_offload():
    model = sharded(offload_policy=CPUOffloadPolicy(pin_memory=False))
    train(model, ours(model))
    close(weights(model), weights(single_process()))


@pytest.mark.ranks(2)
def test_bfloat16_parameters():
    """torch's clip_grad_norm_ takes the norm of bfloat16 gradients in bfloat16; ours is that of float32."""
    models = [fully_shard(net().bfloat16()) for _ in range(2)]
    optimizer = ours(models[0], max_grad_norm=None)
    to_bfloat16 = lambda x: x.chunk(2)[dist.get_rank()].bfloat16()  # noqa: E731
    train(models[0], optimizer, split=to_bfloat16)
    train(models[1], theirs(models[1]), split=to_bfloat16)
    # States are bfloat16 in both; torch rounds after each operation, ours once: a bfloat16 rounding or two.
    close(weights(models[0]), weights(models[1]), 2**-6)
    loss_of(models[0], 7, to_bfloat16).backward()
    exact = torch.cat([full(p.grad).double().flatten() for p in models[0].parameters()]).norm()
    optimizer.max_grad_norm = 0.5
    optimizer.step()
    torch.testing.assert_close(optimizer.grad_norm.double(), exact, rtol=1e-6, atol=0)


@pytest.mark.ranks(2)
def test_ignored_parameters_stay_plain():
    """A mix of plain and distributed parameters, over which torch's clip_grad_norm_ raises."""
    model = net()
    ignored = [model.norm.weight, model.norm.bias, model.gain]
    fully_shard(model, ignored_params=set(ignored))

    def average_the_plain(model):
        for p in ignored:
            dist.all_reduce(p.grad)
            p.grad /= 2

    optimizer = ours(model)
    with counted(optimizer) as calls:
        train(model, optimizer, before_step=average_the_plain)
    assert calls == [2] * 3  # the plain ones' sum stays at home
    close(weights(model), weights(single_process()))
    same_on_all_ranks([*weights(model), optimizer.grad_norm])


@pytest.mark.ranks(2)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_deferred_clipping(backend):
    """optimizer.clip_grad_norm_() returns the norm over all ranks, and communicates once."""
    model = sharded(build_for(backend))
    optimizer = ours(model, max_grad_norm=None, backend=backend)
    norms = []
    with counted(optimizer) as calls:
        train(model, optimizer, steps=3, before_step=lambda model: norms.append(optimizer.clip_grad_norm_(0.5)))
    assert calls == []
    close(weights(model), weights(single_process(steps=3, build=build_for(backend))))
    same_on_all_ranks([*weights(model), *norms])


@pytest.mark.ranks(2)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_averages(backend):
    model = sharded(build_for(backend))
    optimizer = ours(model, ema_decay=0.9, backend=backend)
    expected = [full(p).clone() for p in optimizer.param_groups[0]["params"]]
    for number in range(3):
        train(model, optimizer, steps=1, start=number)
        expected = [a + 0.1 * (full(p) - a) for a, p in zip(expected, optimizer.param_groups[0]["params"])]
    averages = optimizer.ema_parameters()
    assert averages[0].placements == model.first.weight.placements
    close(map(full, averages[: len(expected)]), expected)
    trained = [w.clone() for w in weights(model)]
    with optimizer.ema_parameters():
        close([full(model.first.weight)], [expected[0]])
    assert all(map(torch.equal, trained, weights(model)))


@pytest.mark.ranks(2)
@pytest.mark.parametrize("reshard", [None, False], ids=["outermost", "all"])
def test_what_forward_has_gathered_is_gathered_anew_where_weights_were_exchanged(reshard):
    """Without a backward pass FSDP goes on with it: by default the outermost module does."""
    model, reference = sharded(reshard_after_forward=reshard), net()
    optimizers = [ours(m, ema_decay=0.9) for m in (model, reference)]
    x = torch.randn(3, 7)

    def evaluate():
        with torch.no_grad():
            close([model(x)], [reference(x)], 1e-5)

    for number in range(2):
        train(model, optimizers[0], steps=1, start=number)
        train(reference, optimizers[1], steps=1, start=number, split=lambda x: x)
        evaluate()
        with optimizers[0].ema_parameters(), optimizers[1].ema_parameters():
            evaluate()
    evaluate()
    for optimizer in optimizers:
        optimizer.load_master_state_dict({k: 2 * x for k, x in optimizer.master_state_dict().items()})
    evaluate()
    close(weights(model), weights(reference))


@pytest.mark.ranks(2)
def test_states_that_are_elsewhere_between_steps():
    """As trainers do that generate between steps: the memory of the shards' states is free then."""
    model = sharded(build_for("triton"))
    optimizer = ours(model, backend="triton")
    train(model, optimizer, steps=2)
    memory = []
    for state in optimizer.state.values():
        for key, value in state.items():
            if isinstance(value, DTensor):
                memory.append(StorageWeakRef(value._local_tensor.untyped_storage()))
                state[key] = value.clone()
            del value
    gc.collect()
    assert memory and all(storage.expired() for storage in memory)
    train(model, optimizer, steps=2, start=2)
    close(weights(model), weights(single_process(steps=4, build=build_for("triton"))))
    same_on_all_ranks(weights(model))
