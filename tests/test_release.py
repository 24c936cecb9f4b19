"""Gradient release: the same training, and no two gradients at a time."""

import copy

import pytest
import torch
from cases import every_optimizer_and_backend
from options import LR, STATEFUL
from oracles import oracle_class
from pairs import assert_same, close, close_states, raised, snapshot
from torch.nn.parallel import DistributedDataParallel

import fusedopt


class Net(torch.nn.Module):
    """Tied weights, a bias that is not trained, and a layer that is not always used."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = (torch.nn.Linear(5, 5) for _ in range(3))
        self.b.weight = self.a.weight
        self.b.bias.requires_grad_(False)

    def forward(self, x, short):
        x = self.b(torch.tanh(self.a(x)))
        return x if short else self.c(x)


def groups_of(net):
    return [{"params": [net.a.weight, net.c.weight]}, {"params": [net.a.bias, net.b.bias, net.c.bias], "lr": LR / 2}]


def pair_of(name, device, **settings):
    nets = Net().to(device, torch.float64), Net().to(device, torch.float64)
    options = {"lr": LR, **STATEFUL[name]}
    ours = fusedopt.registry[name](groups_of(nets[0]), **options, **settings)
    return nets, ours, oracle_class(name)(groups_of(nets[1]), **options, foreach=False)


def loss_of(net, number):
    generator = torch.Generator().manual_seed(number)
    x = torch.randn(3, 5, generator=generator, dtype=torch.float64).to(net.a.weight.device)
    return net(x, number % 3 == 2).square().sum()


def train(net, optimizer, number, limit=None):
    optimizer.zero_grad()
    loss_of(net, number).backward()
    if limit is not None:
        torch.nn.utils.clip_grad_value_(net.parameters(), limit)
    optimizer.step()


@every_optimizer_and_backend
def test_as_step(name, backend, device):
    """Groups, a scheduler, clipping by value and averages; begun and ended in the middle of training."""
    (net, other), optimizer, oracle = pair_of(name, device, max_grad_value=0.5, ema_decay=0.8, backend=backend)
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(each, 0.9) for each in (optimizer, oracle)]
    averages = None
    release = None
    for number in range(9):
        if number == 2:
            release = fusedopt.enable_gradient_release(net, optimizer)
        if number == 7:
            release.remove()
        train(net, optimizer, number)
        assert all((p.grad is None) == (2 <= number < 7) for p in (net.a.weight, net.a.bias))
        before = [p.detach().clone() for p in other.parameters()]
        averages = before if averages is None else averages
        train(other, oracle, number, limit=0.5)
        averages = [
            a if p.grad is None else a + 0.2 * (p.detach() - a)
            for a, p in zip(averages, other.parameters(), strict=True)
        ]
        for scheduler in schedulers:
            scheduler.step()
    close(net.parameters(), other.parameters(), 1e-12)
    by_parameter = dict(zip(all_parameters(optimizer), optimizer.ema_parameters()))
    close([by_parameter[p] for p in net.parameters()], averages, 1e-12)
    close_states(optimizer, oracle, 1e-12)


def all_parameters(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


def test_schedulers_know_of_steps(device, recwarn):
    """Where nobody calls ``step()``, which would find nothing to do."""
    (net, _), optimizer, _ = pair_of("Adam", device)
    fusedopt.enable_gradient_release(net, optimizer)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    loss_of(net, 0).backward()
    scheduler.step()
    assert not [str(warning.message) for warning in recwarn if "lr_scheduler" in str(warning.message)]


def test_gradients_are_freed(device):
    (net, _), optimizer, _ = pair_of("Adam", device)
    fusedopt.enable_gradient_release(net, optimizer)
    alive = []
    params = list(net.parameters())
    for p in params:
        if p.requires_grad:
            # Runs after ours, which was there first.
            p.register_post_accumulate_grad_hook(lambda _: alive.append(sum(q.grad is not None for q in params)))
    loss_of(net, 0).backward()
    assert alive == [0] * 4  # weights and biases of a and c, those of a before and after b's use of the one


def test_checkpoints(device):
    (net, other), optimizer, oracle = pair_of("AdamW", device)
    fusedopt.enable_gradient_release(net, optimizer)
    for number in range(6):
        train(net, optimizer, number)
        train(other, oracle, number)
        if number == 2:
            saved = copy.deepcopy(optimizer.state_dict())
            train(net, optimizer, 7)
            optimizer.load_state_dict(saved)
            net.load_state_dict(other.state_dict())
            for group in optimizer.param_groups + oracle.param_groups:  # new ones, which loading has made
                group["lr"] /= 2
    close(net.parameters(), other.parameters(), 1e-12)


def test_groups_that_are_taken_out(device):
    """Their parameters keep gradients and values, also when they come back for ``step()``."""
    (net, other), optimizer, oracle = pair_of("AdamW", device)
    fusedopt.enable_gradient_release(net, optimizer)
    for number in range(6):
        if number in (2, 4):
            for each in (optimizer, oracle):
                each.param_groups.append(each.param_groups.pop(0)) if number == 2 else each.param_groups.pop(0)
        train(net, optimizer, number)
        train(other, oracle, number)
    assert net.c.bias.grad is not None and net.c.weight.grad is None
    close(net.parameters(), other.parameters(), 1e-12)


def test_parameters_that_are_taken_out_of_a_group(device):
    """By its list or in another one; and put into another group. Neighbours in the list go on."""
    (net, other), optimizer, oracle = pair_of("AdamW", device)
    fusedopt.enable_gradient_release(net, optimizer)
    for number in range(8):
        for each in (optimizer, oracle):
            first, second = (group["params"] for group in each.param_groups)
            if number == 2:
                del second[0]
            if number == 4:
                each.param_groups[0]["params"] = first[1:]
            if number == 6:
                second.append(first.pop())
        train(net, optimizer, number)
        train(other, oracle, number)
        out = [p for p in net.parameters() if p.requires_grad and p not in set(all_parameters(optimizer))]
        assert [p.grad is None for p in out] == [False] * ((number > 1) + (number > 3))
    close(net.parameters(), other.parameters(), 1e-12)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_backward_that_raises_halfway(error, device):
    """What it has reached was updated, as often as it was, and what it has not goes on at the next one."""
    (net, other), optimizer, oracle = pair_of("AdamW", device)
    fusedopt.enable_gradient_release(net, optimizer)

    def fail(grad):
        raise error

    for number in range(4):
        for each in (net, other):
            x = torch.linspace(-1, 1, 15, dtype=torch.float64, device=device).view(3, 5)
            hidden = torch.tanh(each.a(x))
            if number in (0, 2):
                hidden.register_hook(fail)
            loss = each.c(each.b(hidden)).square().sum()
            if number in (0, 2):
                with pytest.raises(error):
                    loss.backward()
            else:
                loss.backward()
        oracle.step()
        oracle.zero_grad()
        assert all(p.grad is None for p in net.parameters())
    close(net.parameters(), other.parameters(), 1e-12)


@pytest.mark.parametrize("name", ["SGD", "Adam"])
def test_loaded_averages_go_on(name, device):
    found = []
    for releases in (False, True):
        (net, _), _, _ = pair_of(name, device)
        optimizer = fusedopt.registry[name](net.parameters(), lr=LR, ema_decay=0.8)
        if releases:
            fusedopt.enable_gradient_release(net, optimizer)
        for number in range(4):
            train(net, optimizer, number)
            if number == 1:
                optimizer.load_ema_state_dict({k: 0 * x for k, x in optimizer.ema_state_dict().items() if k})
        found.append(optimizer.ema_parameters())
    close(*found, 1e-12)


def test_random_bits_are_those_of_a_step(device):
    """Each parameter has bits of its own."""
    found = []
    for releases in (False, True):
        net = Net().to(device, torch.bfloat16)
        optimizer = fusedopt.AdamW(groups_of(net), lr=1e-4, master="stochastic", state_dtype=torch.bfloat16)
        if releases:
            fusedopt.enable_gradient_release(net, optimizer)
        x = torch.linspace(-1, 1, 15, device=device).view(3, 5).bfloat16()
        for _ in range(3):
            optimizer.zero_grad()
            net(x, False).square().sum().backward()
            optimizer.step()
        found.append([*net.parameters(), *(optimizer.state[p]["exp_avg_sq"] for p in (net.a.weight, net.c.bias))])
    assert all(map(torch.equal, *found))


def test_averages_are_not_trained(device):
    (net, _), optimizer, _ = pair_of("AdamW", device, ema_decay=0.9)
    fusedopt.enable_gradient_release(net, optimizer)
    train(net, optimizer, 0)
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match="where parameters hold their averages"), optimizer.ema_parameters():
        loss_of(net, 1).backward()
    optimizer.zero_grad()
    assert_same(before, snapshot(optimizer))


@pytest.mark.parametrize("settings", [{"max_grad_norm": 1.0}, {"skip_nonfinite": True}], ids=str)
def test_settings_that_need_all_gradients(settings, device):
    (net, _), optimizer, _ = pair_of("Adam", device)
    ((name, value),) = settings.items()
    optimizer.skip_nonfinite = name == "skip_nonfinite"
    optimizer.max_grad_norm = 1.0 if name == "max_grad_norm" else None
    with pytest.raises(RuntimeError, match=f"{name} would need"):
        fusedopt.enable_gradient_release(net, optimizer)
    optimizer.skip_nonfinite, optimizer.max_grad_norm = False, None
    fusedopt.enable_gradient_release(net, optimizer)
    train(net, optimizer, 0)
    before = snapshot(optimizer)
    setattr(optimizer, name, value)
    with pytest.raises(RuntimeError, match=f"{name} would need"):
        loss_of(net, 1).backward()
    assert_same(before, snapshot(optimizer))


def test_other_misuse(device):
    (net, other), optimizer, oracle = pair_of("Adam", device)
    with pytest.raises(TypeError, match="needs an optimizer of fusedopt, got Adam"):
        fusedopt.enable_gradient_release(other, oracle)
    with pytest.raises(TypeError, match="needs the module that is called, got generator"):
        fusedopt.enable_gradient_release(net.parameters(), optimizer)
    with pytest.raises(ValueError, match="none of the model's parameters"):
        fusedopt.enable_gradient_release(other, optimizer)
    release = fusedopt.enable_gradient_release(net, optimizer)
    with pytest.raises(RuntimeError, match="enabled already"):
        fusedopt.enable_gradient_release(net, optimizer)
    for norm_type in (2.0, 1.0):
        with pytest.raises(RuntimeError, match="needs all gradients together"):
            optimizer.clip_grad_norm_(1.0, norm_type)
    scaler = fusedopt.GradScaler(device.type, init_scale=2.0)
    scaler.scale(loss_of(net, 0))
    with pytest.raises(RuntimeError, match="cannot be combined with a GradScaler"):
        scaler.step(optimizer)
    release.remove()
    fusedopt.enable_gradient_release(net, optimizer)
    release.remove()
    with pytest.raises(RuntimeError, match="enabled already"):
        fusedopt.enable_gradient_release(net, optimizer)
    embedding = torch.nn.Embedding(5, 2, sparse=True, device=device)
    optimizer = fusedopt.SGD(embedding.parameters())
    fusedopt.enable_gradient_release(embedding, optimizer)
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match="gradient release cannot be combined with a sparse gradient"):
        embedding(torch.tensor([1, 3], device=device)).sum().backward()
    assert_same(before, snapshot(optimizer))


@pytest.fixture
def process_group(tmp_path):
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("when", ["before", "after"])
def test_wrappers_that_reduce_gradients_later(when, process_group):
    (net, _), optimizer, _ = pair_of("Adam", torch.device("cpu"))
    if when == "before":
        wrapped = DistributedDataParallel(net)
        with pytest.raises(RuntimeError, match="with DistributedDataParallel would update"):
            fusedopt.enable_gradient_release(wrapped, optimizer)
    else:
        fusedopt.enable_gradient_release(net, optimizer)
        wrapped = DistributedDataParallel(net)
        with pytest.raises(RuntimeError, match="with DistributedDataParallel would update"):
            wrapped(torch.zeros(1, 5, dtype=torch.float64), False)


@pytest.mark.parametrize("when", ["before", "after"])
def test_fsdp1(when):
    (net, _), optimizer, _ = pair_of("Adam", torch.device("cpu"))
    if when == "after":
        fusedopt.enable_gradient_release(net, optimizer)
    net.a.weight._fsdp_flattened = True
    error = raised(lambda: fusedopt.enable_gradient_release(net, optimizer) if when == "before" else loss_of(net, 0))
    assert isinstance(error, RuntimeError) and "FullyShardedDataParallel" in str(error)
