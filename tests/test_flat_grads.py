"""``flat_grads=True``: gradients that stay where they are."""

import copy
import pickle

import pytest
import torch
from cases import every_kind_and_backend
from pairs import assert_same, snapshot

import fusedopt


def network(dtype=torch.float32, device="cpu"):
    torch.manual_seed(0)
    layers = torch.nn.Sequential(torch.nn.Conv2d(2, 4, 3), torch.nn.Flatten(), torch.nn.Linear(36, 3))
    layers[0].weight = torch.nn.Parameter(layers[0].weight.detach().to(memory_format=torch.channels_last))
    return layers.to(device, dtype)


def backward(layers, number):
    generator = torch.Generator().manual_seed(number)
    x = torch.randn(6, 2, 5, 5, generator=generator).to(layers[2].weight)
    layers(x).square().mean().backward()


def addresses(layers):
    return [p.grad.data_ptr() for p in layers.parameters()]


@every_kind_and_backend
def test_trains_as_without(name, backend, device):
    ended = []
    for flat in ("zeroed", True, False):
        layers = network(device=device)
        optimizer = fusedopt.registry[name](
            layers.parameters(), lr=0.01, flat_grads=flat, backend=backend, max_grad_norm=0.1
        )
        places = []
        for number in range(6):
            optimizer.zero_grad(set_to_none=number % 2 == 0)
            for part in range(2):
                backward(layers, 2 * number + part)
            places.append(addresses(layers))
            optimizer.step()
        assert not flat or places.count(places[0]) == len(places)
        ended.append([p.detach() for p in layers.parameters()])
    # backward adds to zeros what it otherwise puts there: the same number.
    for others in ended[1:]:
        assert all(map(torch.equal, ended[0], others))


def test_one_buffer_holds_them_and_zeros():
    layers = network()
    optimizer = fusedopt.AdamW(layers.parameters(), flat_grads=True)
    optimizer.zero_grad()
    assert [float(p.grad.abs().sum()) for p in layers.parameters()] == [0.0] * 4
    assert all(p.grad.stride() == p.stride() for p in layers.parameters())
    (buffer,) = optimizer._flat_grads.buffers
    backward(layers, 0)
    inside = [buffer.data_ptr() <= p.grad.data_ptr() < buffer.data_ptr() + buffer.nbytes for p in layers.parameters()]
    assert all(inside) and all(p.grad.abs().sum() > 0 for p in layers.parameters())
    optimizer.zero_grad()
    assert not buffer.any()


def test_autograd_knows_that_they_were_zeroed():
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = fusedopt.SGD([p], lr=0.1, flat_grads=True)
    optimizer.zero_grad()
    (p * 2).sum().backward()
    squares = (p.grad * torch.ones(3, requires_grad=True)).sum()
    optimizer.zero_grad()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        squares.backward()


def test_what_others_do_to_gradients_and_parameters():
    """model.zero_grad(), another dtype, a new group, frozen parameters: the next zero_grad() brings them back."""
    layers = network()
    optimizer = fusedopt.SGD(layers[0].parameters(), lr=0.1, flat_grads=True)
    twin = copy.deepcopy(layers)
    theirs = torch.optim.SGD(twin[0].parameters(), lr=0.1)

    def both(number, change=lambda layers, optimizer: None):
        for model, opt in ((layers, optimizer), (twin, theirs)):
            opt.zero_grad()
            change(model, opt)
            backward(model, number)
            opt.step()
        assert all(torch.allclose(p, q, rtol=1e-6, atol=0) for p, q in zip(layers.parameters(), twin.parameters()))

    both(0)
    both(1, lambda model, opt: model.zero_grad())
    both(2)
    first = addresses(layers[0])
    both(3, lambda model, opt: model.double())
    both(4)
    assert [p.grad.dtype for p in layers[0].parameters()] == [torch.float64] * 2 and addresses(layers[0]) != first
    both(5, lambda model, opt: opt.add_param_group({"params": list(model[2].parameters())}))
    both(6)
    assert len(optimizer._flat_grads.given) == 4
    both(7, lambda model, opt: model[0].bias.requires_grad_(False))
    both(8)


@pytest.mark.parametrize("flat", [True, "zeroed"])
def test_frozen_parameters_stay_where_they_are(flat):
    """From the next zero_grad() on, whatever momentum they had, and until they are thawed."""
    layers, twin = network(), network()
    pairs = [
        (layers, fusedopt.AdamW(layers.parameters(), lr=0.01, weight_decay=0.1, flat_grads=flat)),
        (twin, torch.optim.AdamW(twin.parameters(), lr=0.01, weight_decay=0.1)),
    ]
    for number in range(9):
        for model, optimizer in pairs:
            model[0].requires_grad_(number % 6 < 3)
            optimizer.zero_grad()
            assert all((p.grad is None) == (number % 6 >= 3 or optimizer is pairs[1][1]) for p in model[0].parameters())
            backward(model, number)
            optimizer.step()
        assert all(torch.allclose(p, q, rtol=1e-5, atol=1e-7) for p, q in zip(layers.parameters(), twin.parameters()))


def test_buffers_do_not_pile_up():
    """Where some parameters are frozen and thawed again and again."""
    layers = network()
    optimizer = fusedopt.AdamW(layers.parameters(), flat_grads=True)
    sizes = []
    for number in range(8):
        layers[0].requires_grad_(number % 2 == 0)
        optimizer.zero_grad()
        sizes.append(sum(buffer.nbytes for buffer in optimizer._flat_grads.buffers))
    assert max(sizes) <= 2 * sizes[0]


def test_parameters_on_the_meta_device():
    """Made there, gradients get their places once the parameters have memory."""
    layers = network(device="meta")
    optimizer = fusedopt.AdamW(layers.parameters(), flat_grads=True)
    optimizer.zero_grad()
    assert all(p.grad is None for p in layers.parameters())
    for p, real in zip(layers.parameters(), network().parameters()):
        torch.utils.swap_tensors(p, real)
    optimizer.zero_grad()
    (buffer,) = optimizer._flat_grads.buffers
    assert [buffer.data_ptr() <= place < buffer.data_ptr() + buffer.nbytes for place in addresses(layers)] == [True] * 4


def test_lazy_modules():
    layers = torch.nn.Sequential(torch.nn.LazyLinear(4), torch.nn.Linear(4, 2))
    optimizer = fusedopt.AdamW(layers.parameters(), flat_grads=True)
    for _ in range(2):
        optimizer.zero_grad()
        layers(torch.ones(2, 3)).sum().backward()
        optimizer.step()
    assert len(optimizer._flat_grads.given) == 4


def test_gradients_of_another_dtype():
    """``p.grad_dtype``, to accumulate in float32 what 16 bits would round."""
    p = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = fusedopt.SGD([p], lr=1.0, flat_grads=True)
    optimizer.zero_grad()
    assert p.grad.dtype == torch.bfloat16
    p.grad, p.grad_dtype = None, torch.float32
    optimizer.zero_grad()
    for part in (1.0, 2**-9):
        (p * part).sum().backward()
    assert torch.equal(p.grad, torch.full((4,), 1 + 2**-9))
    optimizer.step()
    assert torch.equal(p, torch.full((4,), -(2**-9), dtype=torch.bfloat16))


def test_a_part_of_a_larger_buffer_is_left_there():
    bucket = torch.ones(10)
    p = torch.nn.Parameter(torch.ones(4))
    optimizer = fusedopt.SGD([p], lr=0.1, flat_grads=True)
    p.grad = lent = bucket[3:7]
    optimizer.step()
    assert torch.equal(p, torch.full((4,), 0.9))
    optimizer.zero_grad()
    assert p.grad is lent and bucket.tolist() == [1.0] * 3 + [0.0] * 4 + [1.0] * 3


@pytest.mark.parametrize("flat", [True, "zeroed"])
def test_distributed_checkpoints_find_states_to_load_into(flat, tmp_path):
    """torch makes them by a step with zeros, unless a parameter has a gradient: then it loads none and says nothing."""
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    def saved_parts(layers, optimizer):
        return dict(zip(("model", "optimizer"), get_state_dict(layers, optimizer)))

    first, second = (
        (layers, fusedopt.AdamW(layers.parameters(), flat_grads=flat)) for layers in (network(), network())
    )
    for number in range(3):
        first[1].zero_grad()
        backward(first[0], number)
        first[1].step()
    checkpoint.save(saved_parts(*first), checkpoint_id=tmp_path, no_dist=True)
    parts = saved_parts(*second)
    checkpoint.load(parts, checkpoint_id=tmp_path, no_dist=True)
    set_state_dict(*second, model_state_dict=parts["model"], optim_state_dict=parts["optimizer"])
    assert_same(snapshot(first[1]), snapshot(second[1]))


def test_copies_and_the_setting():
    layers = network()
    optimizer = fusedopt.AdamW(layers.parameters(), flat_grads=True)
    optimizer.zero_grad()
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        other.zero_grad()
        params = other.param_groups[0]["params"]
        assert other.flat_grads and all(p.grad is not None for p in params)
        assert not {p.grad.data_ptr() for p in params} & set(addresses(layers))
    optimizer.flat_grads = False
    optimizer.zero_grad()
    assert all(p.grad is None for p in layers.parameters())
    for wrong in (1, "zero", None):
        with pytest.raises(TypeError, match="flat_grads must be True, False or 'zeroed', got"):
            optimizer.flat_grads = wrong
    converted = fusedopt.convert(torch.optim.AdamW(layers.parameters()), flat_grads=True)
    converted.zero_grad()
    assert all(p.grad is not None for p in layers.parameters())


@pytest.mark.parametrize("flat", [True, "zeroed"])
def test_not_with_gradient_release(flat):
    layers = network()
    optimizer = fusedopt.SGD(layers.parameters(), lr=0.1, flat_grads=flat)
    with pytest.raises(RuntimeError, match="flat_grads"):
        fusedopt.enable_gradient_release(layers, optimizer)
