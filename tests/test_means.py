"""Stages that need a mean over their tensor: ``cautious``, and how the means are found."""

import itertools
import math

import pytest
import torch
from cases import KERNEL_NAMES, clip_settings, every_optimizer, kinds, label, model, options_of, random, stands_for_all
from options import IN_TORCH
from pairs import Pair, assert_same, close, snapshot
from rule_cases import optimizer, parameters, results, same_bits, set_gradients, tensors

import fusedopt
from fusedopt import means, torch_backend, torch_blocks

MASKED = [name for name in IN_TORCH if name != "ASGD"]
"""Without ASGD, whose average follows the parameter, and so the mask."""


class Cautious:
    """torch's optimizer, whose every step is masked afterwards: Liang et al., arXiv 2411.16085, algorithm 1. States
    depend on gradients alone, so torch's own are right; the step that it took is lr u."""

    def __init__(self, oracle):
        self.oracle = oracle
        self.param_groups, self.state = oracle.param_groups, oracle.state

    def step(self):
        decays = [group.get("weight_decay", 0.0) for group in self.param_groups]
        before = {p: p.detach().clone() for group in self.param_groups for p in group["params"]}
        for group in self.param_groups:
            if group.get("decoupled_weight_decay"):
                group["weight_decay"] = 0.0
        self.oracle.step()
        for group, decay in zip(self.param_groups, decays):
            if decay:
                group["weight_decay"] = decay
            for p in group["params"]:
                if p.grad is None or not p.numel():
                    continue
                start, decoupled = before[p], group.get("decoupled_weight_decay")
                g = -p.grad if group["maximize"] else p.grad
                g = g if decoupled else g + decay * start
                step = start - p.detach()
                mask = (step * g > 0).to(p.dtype)
                p.data.copy_(start - step * mask / mask.mean().clamp(min=1e-3))
                if decoupled:
                    p.data.sub_(float(group["lr"]) * decay * start)

    def state_dict(self):
        return self.oracle.state_dict()


def cautious_pair(name, options, kind, **settings):
    pair = Pair(name, options, kind, start=0, cautious=True, **settings)
    pair.oracle = Cautious(pair.oracle)
    return pair


@pytest.mark.parametrize(
    ("name", "options"),
    [
        pytest.param(name, options, id=f"{name}-{label(options)}")
        for name in MASKED
        for options in options_of(name)
        if stands_for_all(name, options)
    ],
)
def test_cautious_on_cpu(name, options, device):
    """The options that stand for all, gathered and not, in one block and in several."""
    for kind in kinds("torch", device):
        pair = cautious_pair(name, options, kind, device=device, backend="torch", **clip_settings("both", kind))
        pair.step(5)
        pair.check()
    assert pair.clipped


@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize("name", [name for name in KERNEL_NAMES if name in MASKED])
def test_cautious_in_kernels(name, flatten, device, needs_triton):
    pair = cautious_pair(name, None, "tiny", device=device, backend="triton", flatten=flatten)
    pair.step(4)
    pair.check()


@every_optimizer
def test_cautious_changes_every_optimizer(name, device):
    """Whatever its rule: in momentum some elements disagree with the gradient."""
    ends = []
    for cautious in (False, True):
        params = model("direct", device=device)
        made = fusedopt.registry[name](params, lr=0.01, cautious=cautious)
        for t in range(3):
            set_gradients(params, [torch.full_like(p, (-0.9) ** t) for p in params])
            params[1].grad[0] = 0.0
            made.step()
        ends.append(params)
    assert not all(map(torch.equal, *ends))


@pytest.mark.parametrize("tiles", [1, 2, 16])
@pytest.mark.parametrize("address", ["scattered", "flat"])
def test_means_of_large_tensors(tiles, address, device, needs_triton, monkeypatch):
    """One program per tensor or many, the last of which adds the sums up; whole tiles, remainders, misaligned gradients
    and gaps. The mean is of a count, hence exact: what remains is the rounding of the update."""
    monkeypatch.setattr(means, "CHUNK", tiles)
    sizes = [5 * 1024, 3, 9 * 1024 + 37, 0, 1024]
    values = tensors(sizes, device)
    if address == "scattered":
        values.append(torch.stack([values[0], values[0]], dim=-1)[..., 0])
    params = [torch.nn.Parameter(value) for value in values]
    del values  # what others hold is not flattened
    made = optimizer("momentum", params, address, cautious=True, lr=1.0, dampening=0.0)
    first, second = (tensors([p.numel() for p in params], device, seed=seed) for seed in (1, 2))
    second[2] = torch.cat([second[2], second[2][:1]])[1:]  # 4 bytes off
    set_gradients(params, first)
    made.step()
    before = [p.detach().clone() for p in params]
    set_gradients(params, second)
    made.step()
    for p, start, g1, g2 in zip(params, before, first, second):
        u = 0.9 * g1 + g2
        mask = (u * g2 > 0).to(p.dtype)
        expected = start - u * (mask / mask.mean())
        assert p.numel() < 4 or 0.5 < mask.mean() < 1
        torch.testing.assert_close(p.detach(), expected, rtol=3e-7, atol=3e-7)
    (executor,) = made._engine.executors
    assert executor.bucket.flat == (address == "flat")
    (chunks,) = executor.chunks.values()
    assert chunks.programs == sum(math.ceil(math.ceil(p.numel() / 1024) / tiles) for p in params)
    assert not chunks.tickets.any()


def test_a_tensor_is_rarely_of_one_mind(device, backend):
    """Where fewer than one in a thousand elements agree, the mean counts as 1e-3; where none does, nothing moves."""
    size = 2000
    (p, q) = params = [torch.nn.Parameter(torch.zeros(size, device=device)) for _ in range(2)]
    made = fusedopt.SGD(params, lr=1.0, momentum=0.9, cautious=True, backend=backend)
    set_gradients(params, [torch.ones_like(p), torch.ones_like(q)])
    made.step()
    assert torch.equal(p.detach(), -torch.ones_like(p))
    g = torch.full_like(p, -0.1)
    g[7] = 0.5
    set_gradients(params, [g, torch.full_like(q, -0.1)])
    made.step()
    moved = torch.zeros_like(p)
    moved[7] = (0.9 + 0.5) * 1000
    torch.testing.assert_close(p.detach(), -1 - moved, rtol=1e-6, atol=0)
    assert torch.equal(q.detach(), -torch.ones_like(q))


def test_signs_of_numbers_whose_product_underflows(device, backend):
    p = torch.nn.Parameter(torch.zeros(3, device=device))
    p.grad = torch.tensor([1e-25, -1e-25, 0.0], device=device)
    fusedopt.SGD([p], lr=1.0, cautious=True, backend=backend).step()
    torch.testing.assert_close(p.detach().cpu(), torch.tensor([-1.5e-25, 1.5e-25, 0.0]), rtol=1e-6, atol=0)


def test_nan_stays_where_it_is(device, backend):
    p = torch.nn.Parameter(torch.zeros(4, device=device))
    p.grad = torch.tensor([math.nan, 1.0, -1.0, 2.0], device=device)
    fusedopt.SGD([p], lr=1.0, cautious=True, backend=backend).step()
    expected = torch.tensor([math.nan, -4 / 3, 4 / 3, -8 / 3])
    torch.testing.assert_close(p.detach().cpu(), expected, equal_nan=True)


def test_switched_on_and_off_in_mid_training(device, backend):
    """At each step as if it had always been so: torch's fused kernels cannot take part."""
    for kind in kinds(backend, device):
        pair = Pair("AdamW", {"weight_decay": 0.1}, kind, device=device, backend=backend)
        plain = pair.oracle
        for cautious in (False, True, True, False):
            pair.opt.cautious = cautious
            pair.oracle = Cautious(plain) if cautious else plain
            pair.step()
            pair.check()


def test_skipped_steps_and_a_loss_scale(device, backend):
    """A GradScaler's scale is taken out before the rule, and a skipped step adds nothing up."""

    def run(scale):
        params = model("tiny", torch.float32, device)
        made = fusedopt.AdamW(params, lr=0.1, cautious=True, skip_nonfinite=True, backend=backend)
        for t in range(4):
            made.grad_scale = torch.full((1,), scale, device=device)
            set_gradients(params, [scale * g for g in tensors([p.shape for p in params], device, seed=t)])
            if t == 2:
                params[1].grad[0, 0] = math.inf
                before = snapshot(made)
            made.step()
            if t == 2:
                assert_same(before, snapshot(made))
        assert made.skipped_steps == 1
        return params

    # A power of two is exact.
    close(run(1.0), run(2.0**16), 0)


def test_equal_bits_in_every_run(device, needs_triton, monkeypatch):
    """The order of addition is fixed, whichever program finishes last, and whoever the neighbours are."""
    monkeypatch.setattr(means, "CHUNK", 1)
    ends = []
    for neighbours in ([], [], [700, 3000]):
        params = parameters([4099, *neighbours], device)
        made = optimizer("adam", params, cautious=True)
        for t in range(3):
            set_gradients(params, tensors([4099, *neighbours], device, seed=t))
            made.step()
        ends.append(results(made)[0])
    for a, b in itertools.pairwise(ends):
        assert all(map(same_bits, a, b))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_small_dtypes_are_rounded_once(dtype, device, backend):
    """The mean is that of numbers which were not yet rounded."""
    narrow = [torch.nn.Parameter(p) for p in tensors([1033, 15], device, dtype)]
    wide = [torch.nn.Parameter(p.detach().float()) for p in narrow]
    for params in (narrow, wide):
        made = fusedopt.SGD(params, lr=0.1, cautious=True, momentum=0.9, backend=backend)
        set_gradients(params, [g.to(p.dtype) for p, g in zip(params, tensors([1033, 15], device, dtype, seed=1))])
        made.step()
    assert all(map(same_bits, narrow, [p.detach().to(dtype) for p in wide]))


def test_no_launch_where_nobody_needs_it(device, needs_triton):
    params = parameters([5], device)
    made = optimizer("adam", params)
    set_gradients(params, tensors([5], device))
    made.step()
    assert made._engine.executors[0].chunks == {}


@pytest.mark.parametrize("position", [0, 1])
def test_pieces_of_a_flat_parameter_are_refused_wherever_they_stand(position):
    """Also beside whole parameters of the same kind (FullyShardedDataParallel's ignored ones)."""
    params = [torch.nn.Parameter(torch.ones(5)) for _ in range(2)]
    params[position]._fsdp_flattened = True
    fused = fusedopt.AdamW(params, cautious=True)
    for p in params:
        p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match=rf"cautious of AdamW needs a mean .* parameter {position} \(group 0"):
        fused.step()


def test_wrong_values():
    for value in (1, "yes", None):
        with pytest.raises(TypeError, match="cautious must be True or False"):
            fusedopt.Adam(model("tiny"), cautious=value)


@pytest.mark.parametrize(
    ("dtype", "storage"),
    [
        (torch.float32, {}),
        (torch.float32, {"state_dtype": "8bit"}),
        (torch.bfloat16, {}),
        (torch.bfloat16, {"state_dtype": torch.float32}),
        (torch.bfloat16, {"master": "kahan"}),
    ],
    ids=str,
)
def test_tensors_of_several_blocks(dtype, storage, monkeypatch):
    """torch takes a large tensor block by block, and computes each block's direction twice, once for the mean. States
    follow the gradient once all the same, however they are stored: the bits are those of one large block. (The mean is
    of a count, hence exact.)"""
    ends = []
    for block in (1024, 2**20):
        monkeypatch.setattr(torch_blocks, "for_threads", lambda usual, block=block: block)
        (p,) = params = parameters([5000], "cpu", dtype)
        made = fusedopt.AdamW(params, lr=0.1, cautious=True, backend="torch", **storage)
        for t in range(3):
            set_gradients(params, tensors([5000], "cpu", dtype, seed=t))
            made.step()
        ends.append([p.detach(), *(x for x in made.state[p].values() if isinstance(x, torch.Tensor))])
    assert len(ends[0]) > 2 and all(map(same_bits, *ends))


@pytest.mark.parametrize(("name", "settings"), [("LAMB", {}), ("StableAdamW", {}), ("AdamW", {"cautious": True})])
def test_of_many_small_tensors_some_are_taken_at_a_time(name, settings, monkeypatch):
    """Sums over each take copies of all that are."""
    monkeypatch.setattr(torch_backend, "WHOLE", torch_blocks.BLOCK)

    def parameters():
        return [torch.nn.Parameter(random((10_000 + k,), k).double()) for k in range(15)]

    params, others = parameters(), parameters()
    together = fusedopt.registry[name](params, lr=0.1, backend="torch", **settings)
    alone = [fusedopt.registry[name]([p], lr=0.1, backend="torch", **settings) for p in others]
    for number in range(3):
        for p in (*params, *others):
            p.grad = random(tuple(p.shape), 100 + number).double()
        for each in (together, *alone):
            each.step()
    close(params, others, 1e-12)
    (executor,) = together._engine.executors
    assert [len(sizes) for run in executor.runs for sizes in run.sizes] == [13, 2]
