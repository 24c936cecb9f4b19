"""Which memory the kernels read and write: sizes, alignment, strides, gaps, and what lies beside the tensors."""

import pytest
import torch
from rule_cases import (
    ADDRESSES,
    CASES,
    assert_as_twin,
    bits,
    optimizer,
    parameters,
    results,
    same_bits,
    set_gradients,
    states,
    tensors,
    twin_step,
)
from thinning import every_pair

from fusedopt import kernels

pytestmark = pytest.mark.usefixtures("needs_triton")

SIZES = [1, 2, 7, 8, 9, 255, 256, 257, 1023, 1024, 1025, 4097, 7777, (), 0, (0, 3), (3, 0), (1, 1)]
"""Around the vector (8), the granule of flat buffers (256), the tile (1024); several tiles; one and no element."""


def spaces(made):
    return {id(m.place.space): m.place.space for b in made._engine.plan.buckets for m in b.members}.values()


def gaps(space, buffer):
    """The part of a flat buffer that belongs to no tensor."""
    outside = torch.ones(buffer.numel(), dtype=torch.bool, device=buffer.device)
    for index in range(len(space.sizes)):
        outside[space.offsets[index] : space.end(index)] = False
    return buffer[outside]


# What a rule reads and writes is the kernel's business: one for each number of states, and one with an average.
@pytest.mark.parametrize("address", ADDRESSES)
@pytest.mark.parametrize("case", ["sgd", "momentum nesterov", "adam", "amsgrad", "asgd"])
def test_sizes_and_padding(case, address, device):
    params = parameters(SIZES, device)
    made = optimizer(case, params, address, max_grad_norm=1.0, weight_decay=0.1)
    set_gradients(params, tensors(SIZES, device, seed=1))
    expected = twin_step(made, 1)
    made.step()
    assert_as_twin(made, expected)
    set_gradients(params, tensors(SIZES, device, seed=2))
    expected = twin_step(made, 2)
    made.step()
    assert_as_twin(made, expected)
    for space in spaces(made):
        for role, buffer in space.buffers.items():
            if role != "step":
                padding = gaps(space, buffer)
                assert padding.numel() > 256
                assert same_bits(padding, torch.zeros_like(padding)), role


@pytest.mark.parametrize("settings", [{}, {"max_grad_norm": 1.0}, {"skip_nonfinite": True}])
@pytest.mark.parametrize("address", ADDRESSES)
def test_no_elements_at_all(address, settings, device):
    params = parameters([0, (2, 0)], device)
    made = optimizer("adam", params, address, **settings)
    set_gradients(params, tensors([0, (2, 0)], device))
    made.step()
    made.step()
    if settings:
        assert made.grad_norm == 0
    assert [int(s["step"]) for s in made.state_dict()["state"].values()] == [2, 2]


def shifted(x, offset=1):
    """The same numbers, ``offset`` elements behind an aligned address."""
    room = torch.empty(x.numel() + offset, dtype=x.dtype, device=x.device)
    assert room.data_ptr() % 16 == 0
    return room[offset:].copy_(x.flatten()).view(x.shape)


@every_pair
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("address", ADDRESSES)
@pytest.mark.parametrize("moved", ["gradients", "parameters", "one gradient"])
def test_misaligned_memory(moved, address, dtype, device):
    """Bit for bit the same result, by another path; and the path may change from step to step."""
    sizes = [9, 1025, 2049]
    params, aligned = ([torch.nn.Parameter(p) for p in tensors(sizes, device, dtype)] for _ in range(2))
    if moved == "parameters":
        params = [torch.nn.Parameter(shifted(p.detach())) for p in params]
    made, reference = optimizer("adam", params, address), optimizer("adam", aligned)
    for t in range(4):
        grads = tensors(sizes, device, dtype, seed=t)
        set_gradients(aligned, [g.clone() for g in grads])
        if moved == "gradients" and t != 2:
            grads = [shifted(g, 1 + t) for g in grads]
        elif moved == "one gradient":
            grads[t % 3] = shifted(grads[t % 3])
        set_gradients(params, grads)
        made.step()
        reference.step()
        for got, wanted in zip(results(made), results(reference)):
            assert all(map(same_bits, got, wanted))
        # A wrong promise crashes a GPU, but not the interpreter: so look at the promise itself.
        (executor,) = made._engine.executors
        wanted = [all(x.data_ptr() % 16 == 0 for x in (p, g)) for p, g in zip(params, grads)]
        assert executor.tables.records[:, kernels.address.IS_ALIGNED.value].astype(bool).tolist() == wanted


LAYOUTS = {
    "transposed": lambda x: x.t(),
    "channels last": lambda x: x.reshape(2, 3, 8, 7).to(memory_format=torch.channels_last),
    "channel slice": lambda x: torch.stack([x, x], -1)[..., 0],
    "every second row": lambda x: torch.cat([x, x])[::2],
    "permuted": lambda x: x.reshape(2, 12, 14).permute(2, 0, 1),
}
"""Of 24 x 14 elements."""


@pytest.mark.parametrize("address", ADDRESSES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_of_parameters(layout, address, device):
    """Dense or not, the parameter keeps its memory, and its states take torch's strides."""
    made_of = LAYOUTS[layout]
    (x,) = tensors([(24, 14)], device)
    params = [torch.nn.Parameter(made_of(x)), torch.nn.Parameter(x.clone())]
    before, memory = params[0].stride(), params[0].untyped_storage()._cdata
    made = optimizer("amsgrad", params, address, max_grad_norm=1.0)
    for t in (1, 2):
        (g,) = tensors([params[0].shape], device, seed=t)
        # The gradient's strides are the parameter's, or others.
        like = torch.empty_like(params[0], memory_format=torch.preserve_format)
        set_gradients(params, [like.copy_(g) if t == 1 else g, tensors([(14, 24)], device, seed=9)[0].t()])
        expected = twin_step(made, t)
        made.step()
        assert_as_twin(made, expected)
    assert params[0].stride() == before
    if address == "scattered":
        assert params[0].untyped_storage()._cdata == memory
    like = torch.zeros_like(params[0]).stride()  # where torch allocates them
    assert all(state.stride() == like for state in states(made, params[0]))


@pytest.mark.parametrize("case", CASES)
def test_nothing_else_is_written(case, device):
    """Guards before and behind every parameter and gradient, and the elements between those of a slice."""
    sizes = [1, 9, 1024, 1031]
    guard = 1100  # more than a tile
    sentinel = torch.tensor([-7.25], device=device)

    def guarded(x):
        memory = sentinel.repeat(x.numel() + 2 * guard)
        memory[guard : guard + x.numel()] = x
        return memory, memory[guard : guard + x.numel()]

    rooms, params = zip(*map(guarded, tensors(sizes, device)))
    grad_rooms, grads = zip(*map(guarded, tensors(sizes, device, seed=1)))
    grad_before = [room.clone() for room in grad_rooms]
    sliced = sentinel.repeat(2 * 600).view(600, 2)
    params = [torch.nn.Parameter(p) for p in (*params, sliced[:, 0])]
    set_gradients(params, [*grads, torch.ones(600, device=device)])
    made = optimizer(case, params, max_grad_norm=1.0, max_grad_value=0.5, weight_decay=0.1)
    before = [p.detach().clone() for p in params]
    made.step()
    assert not any(torch.equal(p, q) for p, q in zip(params, before))
    for room, size in zip(rooms, sizes):
        assert (room[:guard] == sentinel).all() and (room[guard + size :] == sentinel).all()
    assert (sliced[:, 1] == sentinel).all()
    # The kernels only read gradients, clipped or not.
    assert all(map(same_bits, grad_rooms, grad_before))


@pytest.mark.parametrize("address", ADDRESSES)
def test_gradients_and_parameters_may_move(address, device):
    """New memory at every step, for both."""
    params, still = parameters([300, 5], device), parameters([300, 5], device)
    made, reference = optimizer("adam", params, address), optimizer("adam", still)
    kept = []
    for t in range(3):
        grads = tensors([300, 5], device, seed=t)
        kept.append(grads)  # or the next ones would get the same memory
        set_gradients(params, grads)
        set_gradients(still, tensors([300, 5], device, seed=t))
        made.step()
        reference.step()
        for p in params:
            p.data = shifted(p.detach().clone(), 4 * t)
    assert all(map(same_bits, params, still))


@pytest.mark.parametrize("address", ADDRESSES)
def test_autograd_sees_the_writes(address, device):
    """A raw write to a tensor that the backward pass needs must be an error, as any other in-place write."""
    params = parameters([5, (4, 4)], device)
    params.append(torch.nn.Parameter(torch.ones(6, 2, device=device)[:, 0]))
    made = optimizer("sgd", params, address)
    set_gradients(params, [torch.ones_like(p) for p in params])
    losses = [(p * p).sum() for p in params]
    made.step()
    for loss in losses:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_uninitialised_memory_is_nan(device):
    """So that no test here passes by luck."""
    like = torch.zeros(3, 4, device=device).t()
    made = [torch.empty(5, device=device), torch.empty_like(like), torch.empty_strided((2, 2), (5, 1), device=device)]
    assert all(x.isnan().all() for x in [*made, like.new_empty(3), torch.empty(3, dtype=torch.bfloat16, device=device)])
    assert (torch.empty(3, dtype=torch.int64, device=device) > 1e18).all()


def test_bits_tell_zeros_and_nans_apart(device):
    """The comparison that other tests here rely on."""
    zeros = torch.tensor([0.0, -0.0], device=device)
    assert not same_bits(zeros[:1], zeros[1:])
    assert same_bits(torch.full((2,), torch.nan), torch.full((2,), torch.nan))
    assert bits(zeros.bfloat16()).dtype is torch.int16
