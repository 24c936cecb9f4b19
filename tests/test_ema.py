"""Moving averages of the parameters: as by hand after every step, and never in anybody's way."""

import copy
import math
import pickle

import pytest
import torch
from cases import every_optimizer, every_optimizer_and_backend, give_gradients, kinds, model
from pairs import Pair, assert_same, close, same_bits, snapshot
from thinning import every_pair_but

import fusedopt
from fusedopt import ema

DECAY = 0.8


class ByHand:
    """What a training loop without ``ema_decay`` does; a parameter without a gradient stands still."""

    def __init__(self, params):
        self.averages = [p.detach().clone() for p in params]

    def follow(self, params, decay=DECAY):
        for average, p in zip(self.averages, params):
            if p.grad is not None:
                average.add_(p.detach() - average, alpha=1 - decay)


@every_pair_but("flatten")
@every_optimizer_and_backend
@pytest.mark.parametrize("flatten", [False, True], ids=["in place", "flatten"])
def test_as_by_hand(name, flatten, backend, device):
    """The decay changes on the way, is taken away, and comes back; parameters are what they are without averages."""
    for kind in kinds(backend, device):
        pair = Pair(name, None, kind, device=device, backend=backend, flatten=flatten, start=0, ema_decay=DECAY)
        hand = ByHand(pair.ours)
        for decay in (DECAY, DECAY, 0.0, 0.5, None, 0.9, 0.9):
            pair.opt.ema_decay = decay
            pair.step()
            if decay is not None:
                hand.follow(pair.ours, decay)
            # Like the parameters themselves.
            close(pair.opt.ema_parameters(), hand.averages, 1e-12)
        pair.check()


def test_together_with_everything(backend, device):
    settings = {"max_grad_norm": 3.0, "max_grad_value": 0.4, "skip_nonfinite": True, "flatten": True}
    pair = Pair("AdamW", None, "tiny", device=device, backend=backend, ema_decay=DECAY, **settings)
    hand = ByHand(pair.ours)
    for _ in range(3):
        pair.step()
        hand.follow(pair.ours)
        give_gradients(pair.ours, 5, plain=True)
        pair.ours[1].grad[0, 0] = math.nan
        before = [a.clone() for a in pair.opt.ema_parameters()]
        pair.opt.step()  # is skipped
        assert all(map(same_bits, before, pair.opt.ema_parameters()))
    close(pair.opt.ema_parameters(), hand.averages, 1e-12)
    pair.check()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_averages_of_16_bits_are_float32(dtype, backend, device):
    """In bfloat16 an average would stand still: a thousandth of a step is lost in rounding."""
    p = torch.nn.Parameter(torch.ones(1033, dtype=dtype, device=device))
    optimizer = fusedopt.SGD([p], lr=0.25, ema_decay=0.999, backend=backend)
    for _ in range(2):
        p.grad = torch.ones_like(p)
        optimizer.step()
    (average,) = optimizer.ema_parameters()
    assert average.dtype == torch.float32
    # 1 - 0.25 / 1000, then 0.5 seen from there; two roundings of float32.
    first = 1 - 0.25e-3
    torch.testing.assert_close(average, torch.full_like(average, first + 1e-3 * (0.5 - first)), rtol=2e-7, atol=0)
    with optimizer.ema_parameters():
        assert same_bits(p, average.to(dtype))
    assert torch.equal(p.detach(), torch.full_like(p, 0.5))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@every_optimizer
def test_averages_of_16_bits_beside_every_rule(name, dtype):
    """Whatever kernel of torch's updates the parameters."""
    params = model("tiny", dtype)
    optimizer = fusedopt.registry[name](params, ema_decay=0.75)
    expected = [p.detach().float() for p in params]
    for number in (4, 5):
        give_gradients(params, number)
        optimizer.step()
        expected = [a + 0.25 * (p.detach().float() - a) for a, p in zip(expected, params)]
    # The new parameter is rounded to 8 or 11 bits after it has gone into the average, or before.
    bound = torch.finfo(dtype).eps
    for average, a in zip(optimizer.ema_parameters(), expected):
        assert average.dtype == torch.float32
        torch.testing.assert_close(average, a, rtol=bound, atol=bound)


@every_optimizer
def test_the_state_dict_is_torchs(name, device):
    pair = Pair(name, None, "tiny", device=device, ema_decay=DECAY)
    pair.step(2)
    pair.check()
    assert "ema_decay" not in pair.opt.param_groups[0]


def test_swapping(backend, device):
    params = model("tiny", device=device)
    optimizer = fusedopt.Adam(params, ema_decay=DECAY, backend=backend)
    assert all(map(same_bits, optimizer.ema_parameters(), params))
    with optimizer.ema_parameters():
        pass
    for number in (5, 6):
        give_gradients(params, number)
        optimizer.step()
    trained, averages = [p.detach().clone() for p in params], [a.clone() for a in optimizer.ema_parameters()]
    assert not same_bits(trained[1], averages[1])
    with optimizer.ema_parameters() as swapped:
        assert all(map(same_bits, params, averages))
        assert all(map(same_bits, swapped, averages))
        before = snapshot(optimizer)
        with pytest.raises(RuntimeError, match=r"step\(\) inside"):
            optimizer.step()
        with pytest.raises(RuntimeError, match="averages already"), optimizer.ema_parameters():
            pass
        with pytest.raises(RuntimeError, match=r"load_master_state_dict\(\) inside"):
            optimizer.load_master_state_dict(optimizer.master_state_dict())
        assert_same(before, snapshot(optimizer))
    assert all(map(same_bits, params, trained))
    with pytest.raises(KeyError), optimizer.ema_parameters():
        raise KeyError
    assert all(map(same_bits, params, trained))
    optimizer.step()


@pytest.mark.parametrize("carry", ["state dict", "deepcopy", "pickle"])
def test_carried_on(carry, backend, device):
    """An interrupted run ends as the one that was not; what was loaded or copied is nobody else's."""
    pair = Pair("RMSprop", None, "tiny", device=device, backend=backend, ema_decay=DECAY)
    hand = ByHand(pair.ours)
    for _ in range(6):
        pair.step()
        hand.follow(pair.ours)
        if pair.number == 7 and carry == "state dict":
            saved, averages = copy.deepcopy((pair.opt.state_dict(), pair.opt.ema_state_dict()))
            pair.ours = [torch.nn.Parameter(p.detach().clone()) for p in pair.ours]
            groups = [{"params": pair.ours[:2]}, {"params": pair.ours[2:]}]
            pair.opt = fusedopt.RMSprop(groups, backend=backend, ema_decay=DECAY)
            pair.opt.load_state_dict(saved)
            pair.opt.load_ema_state_dict(averages)
            averages[1].fill_(7.0)
        elif pair.number == 7:
            carried = copy.deepcopy if carry == "deepcopy" else lambda x: pickle.loads(pickle.dumps(x))
            pair.ours, pair.opt = carried((pair.ours, pair.opt))
    close(pair.opt.ema_parameters(), hand.averages, 1e-12)
    pair.check()


def test_parameters_that_move(device):
    """To another dtype, and to memory of somebody else's."""
    module = torch.nn.Linear(7, 5, device=device)
    optimizer = fusedopt.SGD(module.parameters(), lr=0.5, ema_decay=DECAY)
    hand = ByHand(module.parameters())
    for number in range(4):
        if number == 1:
            module.double()
            hand.averages = [a.double() for a in hand.averages]
        if number == 2:
            for p in module.parameters():
                p.data = p.data.clone()
        give_gradients(list(module.parameters()), number + 4)
        optimizer.step()
        hand.follow(module.parameters())
    close(optimizer.ema_parameters(), hand.averages, 1e-6)  # one step in float32


def test_lazy_parameters_have_no_average_yet(device):
    layers = torch.nn.Sequential(torch.nn.LazyLinear(3), torch.nn.Linear(3, 2)).to(device)
    optimizer = fusedopt.SGD(layers.parameters(), lr=0.5, ema_decay=DECAY)
    assert list(optimizer.ema_state_dict()) == [2, 3]
    assert optimizer.ema_parameters()[0] is layers[0].weight
    with optimizer.ema_parameters():
        pass
    layers(torch.ones(1, 5, device=device)).sum().backward()
    hand = ByHand(layers.parameters())
    optimizer.step()
    hand.follow(layers.parameters())
    close(optimizer.ema_parameters(), hand.averages, 1e-6)  # one step in float32
    assert list(optimizer.ema_state_dict()) == [0, 1, 2, 3]


def test_bad_input(device):
    params = model("tiny", device=device)
    for decay in (1.0, -0.1, math.nan, math.inf):
        with pytest.raises(ValueError, match="Invalid ema_decay"):
            fusedopt.SGD(params, ema_decay=decay)
    optimizer = fusedopt.SGD(params)
    with pytest.raises(RuntimeError, match="no averages are kept"):
        optimizer.ema_parameters()
    optimizer.ema_decay = DECAY
    give_gradients(params, 5)
    optimizer.step()
    before = [a.clone() for a in optimizer.ema_parameters()]
    integers = {1: torch.zeros_like(params[1], dtype=torch.int64)}
    for averages in ({9: torch.zeros(1)}, {"0": torch.zeros(())}, {1: torch.zeros(3)}, {1: None}, integers, None, [1]):
        with pytest.raises(ValueError if isinstance(averages, dict) else TypeError, match="average"):
            optimizer.load_ema_state_dict(averages)
    assert all(map(same_bits, before, optimizer.ema_parameters()))
    params[1].grad = params[1].grad.to_sparse()
    with pytest.raises(RuntimeError, match="ema_decay cannot be combined with a sparse gradient"):
        optimizer.step()


@pytest.mark.parametrize("way", ["in", "out"])
def test_an_interrupt_on_the_way_leaves_what_was_trained(way, monkeypatch):
    """As Ctrl-C behind an evaluation: the averages are no place to go on training from."""
    params = model("tiny")
    optimizer = fusedopt.Adam(params, ema_decay=DECAY)
    for number in (4, 5):
        give_gradients(params, number)
        optimizer.step()
    trained, calls = [p.detach().clone() for p in params], []

    def interrupted(params):
        calls.append(params)
        if len(calls) == ("in", "out").index(way) + 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(ema, "gather_anew", interrupted)
    with pytest.raises(KeyboardInterrupt), optimizer.ema_parameters():
        pass
    assert all(map(same_bits, params, trained))
    with optimizer.ema_parameters() as averages:
        assert all(map(same_bits, params, averages))
    assert all(map(same_bits, params, trained))


def test_what_fails_on_the_way_in_leaves_the_parameters():
    params = [torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3))]
    optimizer = fusedopt.SGD(params, lr=1.0, ema_decay=0.5)
    for p in params:
        p.grad = torch.ones(3)
    optimizer.step()
    optimizer._ema[params[1]] = torch.ones(7)
    with pytest.raises(RuntimeError, match="size"), optimizer.ema_parameters():
        raise AssertionError("entered")
    assert all(torch.equal(p, torch.zeros(3)) for p in params)
    del optimizer._ema[params[1]]
    optimizer.step()
