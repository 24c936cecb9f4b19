"""What the cases on several ranks share: a model, its data, a training loop, comparisons.

The reference is torch.optim with ``clip_grad_norm_``, in the same engine or in a single process.
"""

import contextlib

import launch
import torch
import torch.distributed as dist
from torch import nn

import fusedopt

BATCH = 8
MAX_NORM = 0.5
"""Below the norm of every gradient of these models: clipping changes every step."""


class Net(nn.Module):
    """Odd sizes: over two ranks some shards are uneven, and the one of ``gain`` is empty on rank 1."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(7, 33)
        self.norm = nn.LayerNorm(33)
        self.last = nn.Linear(33, 5)
        self.gain = nn.Parameter(torch.full((1,), 3.0))

    def forward(self, x):
        return self.gain * self.last(self.norm(torch.tanh(self.first(x))))


class Small(nn.Module):
    """A matrix whose shards are uneven, and a parameter that is empty on rank 1: for kernels, of which the interpreter
    runs one per tensor."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(7, 5, bias=False)
        self.gain = nn.Parameter(torch.full((1,), 3.0))

    def forward(self, x):
        return self.gain * self.first(x)


def build_for(backend):
    """The model with which cases of this backend train."""
    return Small if backend == "triton" else Net


def net(build=Net):
    """Equal weights at each call, on every rank."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(1)
        return build()


def batch(number):
    """The whole batch of one step, equal on every rank."""
    generator = torch.Generator().manual_seed(1000 + number)
    return torch.randn(BATCH, 7, generator=generator), torch.randn(BATCH, 5, generator=generator)


def part(tensor, group=None, dim=0):
    """This rank's part of a batch."""
    return tensor.chunk(dist.get_world_size(group), dim)[dist.get_rank(group)]


def loss_of(model, number, split=part):
    x, y = batch(number)
    return (model(split(x)) - split(y)).square().mean()


def two_groups(model):
    """Parameter groups with different decay, as frameworks make them."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    return [{"params": matrices}, {"params": others, "weight_decay": 0.0}]


OPTIONS = {"lr": 1e-2, "weight_decay": 0.1, "eps": 1e-3}
"""A larger eps than torch's, or gradients near 0 would turn the order of additions, which depends on the processor,
into differences of 1e-5: a rounding error of a gradient moves a weight by lr / eps = 10 times as much at most."""


def ours(model, **settings):
    return fusedopt.AdamW(two_groups(model), **{**OPTIONS, "max_grad_norm": MAX_NORM, **settings})


def theirs(model):
    return torch.optim.AdamW(two_groups(model), **OPTIONS, foreach=False)


def clip(model):
    return torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)


def train(model, optimizer, steps=3, start=0, accumulate=1, set_to_none=True, split=part, before_step=None):
    """Trains; returns the losses. ``before_step(model)`` is called with all gradients there."""
    losses = []
    for number in range(start, start + steps):
        optimizer.zero_grad(set_to_none=set_to_none)
        for micro in range(accumulate):
            last = micro == accumulate - 1
            with contextlib.nullcontext() if last else quiet(model):
                loss = loss_of(model, number * accumulate + micro, split) / accumulate
                loss.backward()
        if before_step is not None:
            before_step(model)
        optimizer.step()
        losses.append(loss.detach())
    return losses


def quiet(model):
    """Micro-batches that are not the last need no communication."""
    return model.no_sync() if hasattr(model, "no_sync") else contextlib.nullcontext()


def single_process(steps=3, accumulate=1, build=Net):
    """A model that one process has trained on whole batches with torch.optim and clip_grad_norm_."""
    model = net(build)
    train(model, theirs(model), steps, accumulate=accumulate, split=lambda x: x, before_step=clip)
    return model


def full(tensor):
    """The whole of a tensor of which ranks may hold parts."""
    tensor = tensor.detach()
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def weights(model):
    return [full(p) for p in model.parameters()]


def close(a, b, tolerance=1e-6, name="difference"):
    """Equal to ``tolerance``, absolute: weights are about 1, and lr 1e-2 makes rounding errors of a step 1e-9.
    What was found goes into the report."""
    difference = max(((x - y).abs().max().item() for x, y in zip(a, b, strict=True) if x.numel()), default=0.0)
    launch.measured[name] = max(launch.measured.get(name, 0.0), difference)
    assert difference <= tolerance, f"{name} {difference:.3g}, at most {tolerance:.3g}"


def same_on_all_ranks(tensors):
    """Equal to the last bit on every rank."""
    for tensor in tensors:
        mine = torch.empty(tensor.shape, dtype=tensor.dtype).copy_(full(tensor)).reshape(-1).view(torch.uint8)
        everyones = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(everyones, mine)
        assert all(torch.equal(mine, other) for other in everyones), "ranks differ"


def moved(model):
    """That training changed the weights: what compares equal must not be what never moved."""
    return all(not torch.equal(full(p), full(q)) for p, q in zip(model.parameters(), net(type(model)).parameters()))
