"""How parameters and states are stored: every form in kernels against its twin in torch, and each form's promises."""

import math

import pytest
import torch
from cases import MAIN_CASES
from rule_cases import bits, declared_rules, optimizer, same_bits, set_gradients, tensors
from thinning import every_value

import fusedopt
from fusedopt import encodings, forms, philox, storage

pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide):RuntimeWarning:triton")

STORED = [
    # Dtype of the parameter, master, dtype of the states.
    (torch.bfloat16, "stochastic", torch.bfloat16),
    (torch.bfloat16, "kahan", None),
    (torch.bfloat16, "split8", "8bit"),
]
"""With every rule."""

STORED_WITH_ADAM = [
    *STORED,
    (torch.bfloat16, "split", torch.float32),
    (torch.bfloat16, "fp32", torch.float32),
    (torch.bfloat16, None, "8bit"),
    (torch.float16, "stochastic", torch.float32),
    (torch.float16, "kahan", None),
    (torch.float32, None, "8bit"),
    (torch.float64, None, torch.bfloat16),
]
"""A form does not know the rule."""


def values(made, p):
    """What one parameter's roles hold, as float64, by role."""
    state = made.state[p]
    names = ["", *(key for key, form in made._engine.plan.buckets[0].stored.kept)]
    there = {name: encodings.found(name, state, p) or (forms.nearest(p.dtype), [p.detach()]) for name in names}
    wide = forms.wide(p.dtype)
    return {name: encodings.decode(*x, wide).double() for name, x in there.items()}


def steps_of(form, x, scale):
    """The distance between neighbouring values of a form near each x. ``scale``: the largest of its block."""
    if form.name == "signed8":
        return scale / 127
    if form.name == "root8":
        return 2 * scale.sqrt() / 255 * x.sqrt() + scale / 255**2
    digits = {"split": 24, "split8": 16, "fp32": 24, "kahan": 16 if form.parts[0].dtype is torch.bfloat16 else 22}
    eps = 2.0 ** (1 - digits[form.name]) if form.name in digits else torch.finfo(form.parts[0].dtype).eps
    # Between 2^-8 and 1 the rounding of what was taken away counts too, and float16 has no numbers below 2^-24.
    return eps * x.abs() + (2.0**-24 if form.parts[0].dtype is torch.float16 else 0)


def largest_of_blocks(x):
    padded = torch.zeros(-(-x.numel() // 256) * 256, dtype=x.dtype, device=x.device)
    padded[: x.numel()] = x.abs().flatten()
    return padded.view(-1, 256).amax(1).repeat_interleave(256)[: x.numel()].view(x.shape)


@every_value
@pytest.mark.usefixtures("needs_triton")
@pytest.mark.parametrize(
    ("case", "stored"),
    [(case, stored) for case in MAIN_CASES for stored in (STORED_WITH_ADAM if case == "adam" else STORED)],
    ids=lambda x: x if isinstance(x, str) else "-".join(str(part).removeprefix("torch.") for part in x),
)
def test_kernels_store_what_their_twins_store(case, stored, device, monkeypatch):
    """Two steps, each from the same numbers. Arithmetic differs by roundings of float32, so that a value may be
    stored one step off where it lies half way between two."""
    monkeypatch.setattr(storage, "SMALL", 1000)
    dtype, master, state_dtype = stored
    if not declared_rules()[case.split()[0]].keys:
        state_dtype = None
    # A tile, a block of 256 in the next, and a remainder; small enough to have no quantized states.
    sizes = [1024 + 265, 33]
    chain = {"max_grad_norm": 50.0, "weight_decay": 0.1, "master": master, "state_dtype": state_dtype, "seed": 7}
    ours, theirs = ([torch.nn.Parameter(p) for p in tensors(sizes, device, dtype)] for _ in range(2))
    kernel, twin = optimizer(case, ours, **chain), optimizer(case, theirs, **chain | {"backend": "torch"})
    for t in (1, 2):
        grads = tensors(sizes, device, dtype, seed=t)
        set_gradients(ours, grads)
        set_gradients(theirs, [g.clone() for g in grads])
        kernel.step()
        twin.step()
        for p, q in zip(ours, theirs):
            assert {k: (v.dtype, v.shape) for k, v in kernel.state[p].items()} == {
                k: (v.dtype, v.shape) for k, v in twin.state[q].items()
            }
            stored_as = {bucket: bucket.stored for bucket in kernel._engine.plan.buckets}
            (roles,) = {s.roles for b, s in stored_as.items() if any(m.param is p for m in b.members)}
            got, wanted = values(kernel, p), values(twin, q)
            for role, form in roles:
                x, y = got[role], wanted[role]
                step = steps_of(form, torch.maximum(x.abs(), y.abs()), largest_of_blocks(y))
                error = (x - y).abs()
                assert (error <= 1.01 * step + 1e-6 * (y.abs() + y.abs().mean())).all(), role
                if not form.name.startswith(("split", "fp32")) and form.parts[0].dtype.itemsize < 4:
                    # One element in fifty may lie at the border of two roundings; of few elements, one.
                    others = (error > 1e-6 * (y.abs() + y.abs().mean())).sum()
                    assert others <= max(1, 0.02 * y.numel()), role
        for p, q in zip(ours, theirs):
            q.data.copy_(p.data)
            for key, value in kernel.state[p].items():
                twin.state[q][key].copy_(value)


SPECIAL = torch.tensor(
    [
        0.0,
        -0.0,
        1.0,
        -1.0,
        math.inf,
        -math.inf,
        math.nan,
        2.0**-133,
        -(2.0**-149),
        3.4e38,
        -3.4028234e38,
        65504.0,
        1e-7,
    ],
)


def special_values(dtype):
    """Random numbers of every size, numbers half way between two of the narrow dtype, and odd ones."""
    patterns = torch.randint(1, 0x7F800000, (3000,), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    half_way = patterns & ~0xFFFF | 0x8000 if dtype is torch.bfloat16 else patterns & ~0x1FFF | 0x1000
    x = torch.cat([patterns, half_way]).view(torch.float32)
    narrow = torch.randn(2000, generator=torch.Generator().manual_seed(1)) * 1e-5
    return torch.cat([x, -x, narrow, SPECIAL])


@pytest.mark.usefixtures("needs_triton")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("master", ["stochastic", "kahan", "split", "split8", "fp32"])
def test_kernel_and_twin_store_the_same_bits(master, dtype, device):
    """From zero, a gradient of -x and a learning rate of 1 make the parameter exactly x, which then is stored."""
    if dtype is torch.float16 and master.startswith("split"):
        return
    x = special_values(dtype).to(device)
    made = []
    for backend in ("triton", "torch"):
        p = torch.nn.Parameter(torch.zeros(x.shape, dtype=dtype, device=device))
        p.grad_dtype = None
        p.grad = -x
        opt = fusedopt.SGD([p], lr=1.0, master=master, backend=backend, seed=2**40 + 3)
        opt.step()
        made.append([p.detach(), *(v for k, v in opt.state[p].items() if k != "step")])
    for a, b in zip(*made, strict=True):
        number = (a == a) & (b == b) if a.is_floating_point() else torch.ones_like(a, dtype=torch.bool)
        assert torch.equal(number, b == b)
        assert torch.equal(bits(a)[number], bits(b)[number])


def test_philox_is_the_published_one():
    """The published implementation's answer for zeros after 7 rounds, and one draw of Triton's."""
    draw = philox.Draw(seed=0, step=0, first=0)
    words = philox.sixteen_bits(draw, 0, 8, torch.device("cpu")).view(4, 2).long()
    assert [hex(low | high << 16) for low, high in words.tolist()] == [
        "0x5f6fb709", "0xd893f64", "0x4f121f81", "0x4f730a48",
    ]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("value", [1.001, -0.3333, 1.7e-5, 1e-7, 65000.1, 2.0**-20 * 1.3])
def test_stochastic_rounding_is_unbiased(value, dtype):
    """The mean over a million draws is the value: |z| < 4 fails once in 16000 seeds, and this one is fixed."""
    count = 1 << 20
    stored = torch.empty(count, dtype=dtype)
    exact = torch.tensor(value, dtype=torch.float32)
    forms.store_stochastic([stored], exact.expand(count).contiguous(), philox.Draw(5, 3, 11), 2)
    error = stored.double() - exact.double()
    above, below = error[error > 0], error[error < 0]
    # Two neighbours of the value, and nothing else.
    assert len(above.unique()) == len(below.unique()) == 1
    assert above.unique() - below.unique() <= 1.001 * max(torch.finfo(dtype).eps * abs(value), 2.0**-24)
    assert error.mean().abs() < 4 * error.std() / count**0.5
    # To the nearest it would be far off.
    assert (exact.to(dtype).double() - exact.double()).abs() > 10 * error.std() / count**0.5


def test_random_bits_depend_on_everything_they_should():
    device = torch.device("cpu")
    base = philox.Draw(seed=1, step=2, first=3)
    same = philox.sixteen_bits(base, 4, 64, device)
    assert torch.equal(same, philox.sixteen_bits(base, 4, 64, device))
    assert torch.equal(same[8:], philox.sixteen_bits(base._replace(first=4), 4, 56, device))
    others = [
        base._replace(seed=2),
        base._replace(seed=1 + 2**32),
        base._replace(step=3),
        base._replace(first=3 + 2**32),
    ]
    for other in others:
        assert (philox.sixteen_bits(other, 4, 64, device) == same).sum() < 4
    assert (philox.sixteen_bits(base, 5, 64, device) == same).sum() < 4


@pytest.mark.parametrize("form", ["split", "split8"])
def test_split_is_exact(form):
    """Every finite float32 comes back: all of them in 24 bits, to a rounding at bit 8 in 16."""
    patterns = torch.randint(0, 1 << 32, (200_000,), generator=torch.Generator().manual_seed(0)).to(torch.int32)
    edges = torch.tensor([0, 1, 0x7F, 0x80, 0x7FFF, 0x8000, 0x8001, 0xFFFF, 0x10000, 0x7FFFFF, 0x7F7FFFFF, 0x7F7F8000])
    edges = torch.cat([edges, edges + (1 << 31)]).to(torch.int32)
    subnormal = patterns & ~0x7F800000
    x = torch.cat([patterns, subnormal, edges]).view(torch.float32)
    x = x[x.isfinite()]
    p, low = (
        torch.empty(len(x), dtype=torch.bfloat16),
        torch.empty(len(x), dtype=torch.int16 if form == "split" else torch.int8),
    )
    forms.store_split([p, low], x, None, 0)
    back = forms.load_split([p, low], torch.float32)
    if form == "split":
        assert same_bits(back, x)
    else:
        assert torch.equal(bits(back), bits(x) + 0x80 & ~0xFF)
    # The parameter is x rounded to the nearest, ties away from zero.
    rounded = x.to(torch.bfloat16)
    assert (torch.equal(p, rounded) or (bits(x)[p != rounded] & 0xFFFF == 0x8000).all()) or form == "split8"


def test_values_that_somebody_else_wrote_count():
    """A parameter changed from outside is the master from then on, also where stale bits would make it NaN."""
    for master in ("kahan", "split", "split8", "fp32"):
        p = torch.nn.Parameter(torch.linspace(-1, 1, 300).bfloat16())
        opt = fusedopt.SGD([p], lr=0.01, master=master)
        for _ in range(3):
            p.grad = torch.linspace(0.1, 0.5, 300).bfloat16()
            opt.step()
        with torch.no_grad():
            p[:100] = 0.0
            p[100:200] *= 3
        before = p.detach().clone()
        p.grad = torch.zeros_like(p)
        opt.step()
        # What was rounded off the old value is at most half a step of it.
        torch.testing.assert_close(p.detach(), before, rtol=2**-8, atol=2**-130)
        assert same_bits(p[:100].abs(), torch.zeros(100, dtype=torch.bfloat16)) or master == "split"


@pytest.mark.parametrize("spread", [0.0, 1.0, 6.0])
def test_eight_bits_are_off_by_half_a_step_at_most(spread):
    """Of the block's largest value over 127, or of its root over 255. A small root that is not zero counts as one step,
    so that nothing is divided by a zero that is none."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1000, generator=generator) * torch.exp(spread * torch.randn(1000, generator=generator))
    x[300:310] = 0.0
    back = encodings.decode(forms.SIGNED8, encodings.encode(forms.SIGNED8, x, (1,)), torch.float32)
    assert ((back - x).abs() <= 1.00001 * largest_of_blocks(x) / 254).all()
    squares = x.square()
    back = encodings.decode(forms.ROOT8, encodings.encode(forms.ROOT8, squares, (1,)), torch.float32)
    step = largest_of_blocks(squares).sqrt() / 255
    error = (back.sqrt() - x.abs()).abs()
    assert (error <= 1.00001 * step * torch.where(x.abs() < step, 1.0, 0.5)).all()
    assert torch.equal(back == 0, x == 0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("form", [forms.SIGNED8, forms.ROOT8], ids=["signed8", "root8"])
def test_nan_and_inf_fill_their_block_and_no_other(form, bad):
    x = torch.ones(1000)
    x[300] = bad
    back = encodings.decode(form, encodings.encode(form, x, (1,)), torch.float32)
    assert back[256:512].isnan().all()
    torch.testing.assert_close(back[:256], x[:256])
    torch.testing.assert_close(back[512:], x[512:])


@pytest.mark.parametrize("later", [{"master": "stochastic"}, {"state_dtype": torch.bfloat16}], ids=str)
def test_a_seed_waits_for_something_random(later, backend, device):
    """Without, any seed gives the same; it counts from the step on at which a rounding is set."""
    found = []
    for seed in (0, 5):
        p = torch.nn.Parameter(torch.linspace(-1, 1, 5000, device=device).to(torch.bfloat16))
        optimizer = fusedopt.Adam([p], seed=seed, backend=backend)
        for step in range(4):
            if step == 2:
                found.append(p.detach().clone())
                for name, value in later.items():
                    setattr(optimizer, name, value)
            p.grad = (p.detach() * 1.1).to(p.dtype)
            optimizer.step()
        found.append(torch.cat([p.detach().float(), optimizer.state[p]["exp_avg"].float()]))
    assert torch.equal(found[0], found[2])
    assert not torch.equal(found[1], found[3])


def test_a_seed_set_in_mid_training_counts_from_the_next_step_on(backend, device):
    found = []
    for seed in (0, 5):
        p = torch.nn.Parameter(torch.ones(4096, dtype=torch.bfloat16, device=device))
        optimizer = fusedopt.SGD([p], lr=1e-3, master="stochastic", backend=backend)
        for step in range(3):
            if step == 1:
                found.append(p.detach().clone())
                optimizer.seed = seed
            p.grad = torch.ones_like(p)
            optimizer.step()
        found.append(p.detach().clone())
    assert torch.equal(found[0], found[2])
    assert not torch.equal(found[1], found[3])


def test_a_seed_alone_leaves_a_step_to_torch():
    embedding = torch.nn.Embedding(4, 3, sparse=True)
    optimizer = fusedopt.SGD(embedding.parameters(), lr=0.1, seed=5)
    embedding(torch.tensor([1, 2])).sum().backward()
    optimizer.step()
    assert optimizer.layout().startswith("torch.optim's own step: a sparse gradient")
