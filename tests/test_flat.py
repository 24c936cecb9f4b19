"""``flatten=True``: parameters in one buffer, that nobody notices; those that somebody would notice stay put."""

import copy
import io
import math
import pickle
from itertools import pairwise

import pytest
import torch
from cases import (
    every_kind,
    every_kind_and_backend,
    give_gradients,
    kinds,
    model,
)
from pairs import Pair, close, same_bits
from thinning import every_pair

import fusedopt
from fusedopt.flat import Space

LINEAR = [((40, 10), (40,)), ((10, 40), (10,))] * 5


def linear_parameters(kind="", dtype=torch.float64, device="cpu"):
    """As ``torch.nn.Linear`` has them: dense, each alone in its memory. Other memory lies between them, since a GPU's
    allocator puts small tensors side by side."""
    torch.manual_seed(0)
    about = {"dtype": dtype, "device": device}
    made = [(torch.randn(shape, **about), torch.empty(1000, **about)) for layer in LINEAR for shape in layer]
    return [torch.nn.Parameter(values) for values, _ in made]


def one_step(params, **settings):
    optimizer = fusedopt.SGD(params, lr=0.0, flatten=True, **settings)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    return optimizer


def side_by_side(params):
    """No more than 255 elements of padding between one parameter and the next."""
    spans = sorted((p.data_ptr(), p.data_ptr() + p.numel() * p.element_size()) for p in params if p.numel())
    gaps = [start - end for (_, end), (start, _) in pairwise(spans)]
    return all(0 <= gap < 256 * params[0].element_size() for gap in gaps)


@pytest.mark.parametrize("packed", [0, 4, 9])
def test_views_made_all_at_once_are_those_made_one_by_one(packed, device):
    shapes = [(3,), (), (0,), (4, 5), (1,), (300,), (2, 0), (2, 3, 4), (7,)]
    params = [torch.ones(shape, device=device) for shape in shapes]
    params[3], params[7] = params[3].t(), params[7].permute(1, 2, 0)
    space = Space(params, packed)
    for count, size in (packed, space.packed_size), (len(params), space.size):
        buffer = torch.arange(size, device=device)
        views = space.parts(buffer, count)
        assert len(views) == count
        for index, view in enumerate(views):
            alone = space.part_like(buffer, index)
            assert (view.data_ptr(), view.shape, view.stride()) == (alone.data_ptr(), alone.shape, alone.stride())
            assert torch.equal(view, alone)


def test_parameters_move_into_one_buffer(backend, device):
    params = linear_parameters(device=device)
    before = [(p.detach().clone(), p.stride(), p.requires_grad) for p in params]
    objects = list(params)
    assert not side_by_side(params)
    optimizer = one_step(params, backend=backend)
    assert side_by_side(params)
    assert optimizer.param_groups[0]["params"] == objects
    for p, (value, stride, requires_grad) in zip(params, before):
        assert same_bits(p, value)  # the learning rate was 0
        assert (p.stride(), p.requires_grad, p.is_leaf) == (stride, requires_grad, True)
        assert p.storage_offset() == 0
        assert p.untyped_storage().nbytes() == p.numel() * p.element_size()
    assert f"{len(params)} flattened" in optimizer.layout()


def test_strides_are_kept(backend, device):
    params = [p for p in model("small", device=device) if torch.ops.aten.is_non_overlapping_and_dense(p)]
    strides = [p.stride() for p in params]
    addresses = [p.data_ptr() for p in params]
    one_step(params, backend=backend)
    assert [p.stride() for p in params] == strides
    assert all(p.data_ptr() != address for p, address in zip(params, addresses) if p.numel())


def test_files_of_a_flattened_model():
    module = torch.nn.Sequential(*[torch.nn.Linear(40, 40) for _ in range(20)])
    one_step(list(module.parameters()))
    expected = {key: value.clone() for key, value in module.state_dict().items()}
    file, single = io.BytesIO(), io.BytesIO()
    torch.save(module.state_dict(), file)
    torch.save(module[3].weight, single)
    elements = sum(p.numel() for p in module.parameters())
    # torch's own overhead: some 500 bytes per tensor.
    assert file.tell() < 4 * elements + 600 * 40
    assert single.tell() < 4 * 1600 + 2000
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert all(torch.equal(loaded[key], value) for key, value in expected.items())
    duplicate = pickle.loads(pickle.dumps(module))
    assert all(map(torch.equal, duplicate.parameters(), module.parameters()))


def shared_by_data(params):
    params[4].data = params[0].data
    return [params[0], params[4]]


def views_of_a_buffer(params):
    buffer = torch.cat([p.detach().flatten() for p in params[:4]])
    for p, part in zip(params, buffer.split([p.numel() for p in params[:4]])):
        p.data = part.view(p.shape)
    return [buffer, *params[:4]]


def whole_of_a_buffer(params):
    buffer = params[1].detach().clone()
    params[1].data = buffer.view(-1)
    return [buffer, params[1]]


def detached(params):
    return [params[1].detach(), params[1]]


def numpy_memory(params):
    array = params[1].detach().clone().numpy()
    params[1].data = torch.from_numpy(array)
    return [torch.from_numpy(array), params[1]]


def numpy_alias(params):
    return [torch.from_numpy(params[1].detach().numpy()), params[1]]


def shared_memory(params):
    params[1].data.share_memory_()
    return [params[1]]


SEEN_BY_OTHERS = [
    shared_by_data, views_of_a_buffer, whole_of_a_buffer, detached, numpy_memory, numpy_alias, shared_memory,
]  # fmt: skip


@every_pair
@pytest.mark.parametrize("arrange", SEEN_BY_OTHERS)
@pytest.mark.parametrize("settings", [{}, {"max_grad_norm": 5.0}], ids=["plain", "clip"])
@every_kind
def test_memory_that_others_see_is_not_left(name, arrange, settings):
    pair = Pair(name, None, build=linear_parameters, flatten=True, **settings)
    handles, expected = arrange(pair.ours), arrange(pair.theirs)
    addresses = [h.data_ptr() for h in handles]
    moved = pair.ours[9].data_ptr()
    pair.step(3)
    pair.check()
    assert [h.data_ptr() for h in handles] == addresses
    assert [h.is_shared() for h in handles] == [h.is_shared() for h in expected]
    close(handles, expected, 1e-12)
    assert pair.ours[9].data_ptr() != moved  # an ordinary one


MOVES = {
    "clone": lambda p: p.clone(),
    "other strides": lambda p: p.t().contiguous().t() if p.dim() == 2 else p.clone(),
    "shared": lambda p: p.clone().share_memory_(),
    "another's": lambda p: torch.cat([p.flatten(), p.flatten()])[: p.numel()].view(p.shape),
}


@every_pair
@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize("keep", [True, False], ids=["flatten", "flatten switched off"])
@every_kind_and_backend
def test_moved_parameters_are_let_go(name, move, keep, backend, device):
    some = slice(None, None, 2)
    for kind in kinds(backend, device):
        pair = Pair(name, None, kind, device=device, backend=backend, flatten=True)
        pair.step(2)
        pair.opt.flatten = keep
        for params in (pair.ours, pair.theirs):
            for p in params[some]:
                p.data = MOVES[move](p.data)
        addresses = [p.data_ptr() for p in pair.ours[some]]
        pair.step(3)
        pair.check()
        if move == "another's" or (move == "shared" and device.type == "cpu"):
            # Memory that others see; what owns its memory may be flattened anew.
            assert [p.data_ptr() for p in pair.ours[some]] == addresses


@every_kind_and_backend
def test_switched_on_and_off_in_mid_training(name, backend, device):
    for kind in kinds(backend, device):
        pair = Pair(name, None, kind, device=device, backend=backend)
        for flatten in (False, True, False, True):
            pair.opt.flatten = flatten
            pair.step(2)
            pair.check()


def test_switching_on_flattens_what_was_left_in_place(backend, device):
    params = linear_parameters(device=device)
    optimizer = fusedopt.Adam(params, backend=backend)
    for flatten in (False, True):
        optimizer.flatten = flatten
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
        assert side_by_side(params) == flatten


def test_a_new_optimizer_over_flattened_parameters(backend, device):
    """Starting over with another optimizer, as notebooks do, keeps the parameters flat and right."""
    params = linear_parameters(device=device)
    one_step(params, backend=backend)
    optimizer = fusedopt.Adam(params, lr=0.1, flatten=True, backend=backend)
    expected = [torch.nn.Parameter(p.detach().clone()) for p in params]
    oracle = torch.optim.Adam(expected, lr=0.1, foreach=False)
    for number in range(5, 8):
        for each, its in ((optimizer, params), (oracle, expected)):
            give_gradients(its, number)
            each.step()
    close(params, expected, 1e-12)
    assert side_by_side(params)


def test_changing_sets_of_gradients(backend, device):
    """Few, then many gradients: states and parameters move between buffers, their values do not change."""
    pair = Pair("Adam", None, "small", device=device, backend=backend, flatten=True)
    if backend == "triton" and device.type == "cpu":
        pytest.skip("the interpreter has no gathering to switch between")
    for number in range(8):
        for optimizer, params in ((pair.opt, pair.ours), (pair.oracle, pair.theirs)):
            give_gradients(params, number, plain=True)
            for p in params[: 3 + 5 * (number % 3)]:
                p.grad = None
            optimizer.step()
    pair.check()


def test_copies_of_a_flattened_model_are_independent():
    params = linear_parameters()
    optimizer = one_step(params)
    others, other = copy.deepcopy((params, optimizer))
    before = [p.detach().clone() for p in params]
    other.param_groups[0]["lr"] = 0.1
    for p in others:
        p.grad = torch.ones_like(p)
    other.step()
    assert all(map(torch.equal, params, before))
    assert side_by_side(others)
    assert all(torch.allclose(p, q - 0.1) for p, q in zip(others, before))


def test_loading_and_editing_in_place(backend, device):
    """load_state_dict, torch.nn.init and the like write into the parameter: it is the flat buffer."""
    pair = Pair("RMSprop", None, "tiny", device=device, backend=backend, flatten=True)
    for _ in range(2):
        pair.step(2)
        with torch.no_grad():
            for p, q in zip(pair.ours, pair.theirs):
                p.fill_(0.5)
                q.fill_(0.5)
                p.data.mul_(3)
                q.data.mul_(3)
        pair.step(2)
        pair.check()


def test_padding_stays_zero(backend, device):
    """Decay, eps and clipping act on elements, not on the gaps between tensors."""
    params = [torch.nn.Parameter(torch.ones(n, device=device)) for n in (20_000, 3, 17_001, 5)]
    optimizer = fusedopt.AdamW(params, flatten=True, backend=backend, weight_decay=0.5, max_grad_norm=math.pi)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    start = min(p.data_ptr() for p in params)
    bytes_between = max(p.data_ptr() + 4 * p.numel() for p in params) - start
    spaces = {id(place.space): place.space for place in optimizer._engine.places.values()}
    buffers = [buffer for space in spaces.values() for role, buffer in space.buffers.items() if role != "step"]
    assert bytes_between >= 4 * sum(p.numel() for p in params)
    used = sum(p.numel() for p in params)
    assert len(buffers) == 3
    assert all(torch.count_nonzero(buffer) == used for buffer in buffers)
