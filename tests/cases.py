"""What the optimizer tests share: cases, models, gradients."""

import functools
import math

import pytest
import thinning
import torch
from options import IN_TORCH, LR, NAMES, OPTIONS, STATEFUL
from rule_cases import CASES, VARIANTS

# Where others use the cores, every parallel region may wait 8 ms for its turn (facts/cpu.md): 400 s instead of 40.
torch.set_num_threads(1)

AFTER_LOADING = dict.fromkeys(NAMES, 1e-12) | {"NAdam": 1e-8, "ASGD": 1e-8}
"""How far torch.optim may lead away from what was saved. The numbers beside the step count are float32; when torch
loads them it casts them to the parameters' dtype, and from then on rounds them to that. Ours stay as they are."""

CLIPS = {
    "none": lambda root: {},
    "norm": lambda root: {"max_grad_norm": 0.5 * root},
    "value": lambda root: {"max_grad_value": 0.9},
    "below": lambda root: {"max_grad_value": (-0.9, None)},
    "both": lambda root: {"max_grad_norm": 0.5 * root, "max_grad_value": (-0.4, 0.6)},
}
"""Limits that bind at two of three steps and for some of the elements of ``gradient``; ``root`` is the square root
of a model's elements, about the norm of its gradients."""


def clip_settings(clip, kind):
    return CLIPS[clip](sum(math.prod(shape) for shape, _ in shapes(kind)) ** 0.5)


# numpy's, in the interpreter, where numbers overflow or are no numbers on purpose.
interpreter_noise = pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide):RuntimeWarning:triton")
kernels_overflow = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
"""numpy's warnings, in the interpreter, where numbers overflow on purpose."""


def options_of(name):
    """The option sets of one registered optimizer."""
    assert name in OPTIONS, f"{name} is registered, but has no entry in tests/options.py"
    return OPTIONS[name]


def label(options):
    return ",".join(f"{key}={value}" for key, value in options.items()) or "defaults"


every_option = pytest.mark.parametrize(
    ("name", "options"),
    [pytest.param(name, options, id=f"{name}-{label(options)}") for name in NAMES for options in OPTIONS.get(name, [])],
)


def options_and_backends(in_interpreter, in_fallback=lambda name, options: True):
    """The options that ``in_fallback(name, options)`` chooses in the fallback, those of the other in Triton's
    interpreter, which takes a millisecond per program, and all of them in kernels on a GPU."""
    chosen = {"torch": in_fallback, "triton": (lambda *_: True) if torch.cuda.is_available() else in_interpreter}
    return pytest.mark.parametrize(
        ("name", "options", "backend"),
        [
            pytest.param(name, options, backend, id=f"{name}-{label(options)}-{backend}")
            for backend, choose in chosen.items()
            for name in NAMES
            for options in OPTIONS.get(name, [])
            if choose(name, options)
        ],
        indirect=["backend"],
    )


def is_stateful(name, options):
    """Whether these are the defaults or those with most states."""
    return options in ({}, STATEFUL[name])


def stands_for_all(name, options):
    """Whether these are the defaults, those with most states or the last of the table, which change most numbers at
    once. With FUSEDOPT_CASES=all: always."""
    return thinning.ALL or is_stateful(name, options) or options == OPTIONS[name][-1]


MAIN_CASES = [case for case in CASES if thinning.ALL or case.split()[0] not in VARIANTS]
"""For tests of what stands around a rule: without the rules that differ from another in their last line."""

every_choice_of_options = pytest.mark.parametrize(
    ("name", "options"),
    [
        pytest.param(name, options, id=f"{name}-{label(options)}")
        for name in NAMES
        for options in OPTIONS.get(name, [])
        if stands_for_all(name, options)
    ],
)
"""Of every optimizer the options that stand for all."""

some_options_in_kernels = options_and_backends(is_stateful)
fewer_options_in_kernels = options_and_backends(is_stateful, stands_for_all)
every_optimizer = pytest.mark.parametrize("name", NAMES)
every_torch_optimizer = pytest.mark.parametrize("name", IN_TORCH)

KINDS = ["ASGD", "Adagrad", "Adam", "NAdam", "RMSprop", "SGD"]
"""One optimizer for each way to keep states, for tests whose subject is the plan and not the formula: SGD counts no
steps and begins with a special one, Adagrad has its state before the first, NAdam has a number beside the step count,
ASGD two and an average, Adam and RMSprop have up to three states."""

# In Triton's interpreter, at a millisecond per program, these stand for all of those.
KERNEL_NAMES = NAMES if torch.cuda.is_available() else ["ASGD", "RMSprop", "SGD"]

every_optimizer_and_backend = pytest.mark.parametrize(
    ("name", "backend"),
    [(name, "torch") for name in NAMES] + [(name, "triton") for name in KERNEL_NAMES],
    indirect=["backend"],
)
every_kind = pytest.mark.parametrize("name", KINDS)
KINDS_AND_BACKENDS = [(name, "torch") for name in KINDS] + [(n, "triton") for n in KERNEL_NAMES if n in KINDS]
every_kind_and_backend = pytest.mark.parametrize(("name", "backend"), KINDS_AND_BACKENDS, indirect=["backend"])


def shapes(kind):
    """(shape, memory layout) of each parameter of a model.

    "tiny": for the interpreter; "small": all layouts and enough small ones to be gathered; "direct": too large
    to be gathered; "large": all of that, and more than one block; "line": enough for statistics.
    """
    if kind == "line":
        return [((4000,), "")]
    if kind == "direct":
        return [((), ""), ((130, 130), ""), ((150, 120), "transposed")]
    tiny = [((), ""), ((7, 5), ""), ((6, 4), "transposed"), ((0, 3), ""), ((5, 4), "gaps")]
    if kind == "tiny":
        return tiny
    small = [
        *tiny,
        ((1,), ""),
        ((2, 3, 4, 5), "channels_last"),
        ((6, 4), "transposed gaps"),
        ((1, 9), ""),
        *[((2 + k,), "") for k in range(12)],
    ]
    if kind == "small":
        return small
    # A CPU gathers below 16384 elements, and takes 65536 at a time where torch has no fused kernel.
    return [*small, ((130, 130), ""), ((66_000,), ""), ((250, 100), "transposed"), ((16_400, 2), "gaps")]


def kinds(backend, device):
    """The models that differ in how a backend treats them; "tiny" alone for the interpreter."""
    if backend == "triton":
        return ("tiny",) if device.type == "cpu" else ("small",)
    return ("small", "direct")


def laid_out(values, layout):
    """The same values in memory of that layout; gaps hold other numbers."""
    if layout == "channels_last":
        return values.to(memory_format=torch.channels_last)
    if "transposed" in layout:
        return laid_out(values.t(), layout.removeprefix("transposed").strip()).t()
    if layout == "gaps":
        return torch.stack([values, torch.full_like(values, 7.0)], dim=-1)[..., 0]
    # Not the strides of what it was made from.
    return values.clone(memory_format=torch.contiguous_format)


@functools.cache
def random(shape, seed):
    """float32 numbers, which every wider dtype holds too, between 0.5 and 1.5 with random signs. Not to be written to.

    Not near 0, where the direction of Adam and RMSprop changes from -1 to 1 and magnifies roundings by 1 / eps.
    """
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(shape, generator=generator) + 0.5) * (torch.randint(2, shape, generator=generator) * 2 - 1)


def model(kind="small", dtype=torch.float64, device="cpu"):
    """Parameters in every layout: equal values at each call."""
    return [
        torch.nn.Parameter(laid_out(random(shape, 1000 + k).to(device, dtype), layout))
        for k, (shape, layout) in enumerate(shapes(kind))
    ]


STEADY = 4
"""Where a changing set of gradients would make every step a new start, and hide what a kept plan overlooks."""


def gradient(p, k, step):
    """The gradient of the k-th parameter, in changing layouts. Late for one parameter, None at some steps for two;
    from step STEADY on, eight steps bring all of them."""
    if (k == 3 and step < STEADY) or (k in (0, 6) and step % 10 == 2):
        return None
    scale = (0.4, 1.0, 1.6)[step % 3]
    values = random(tuple(p.shape), 100_000 + 1000 * step + k).to(p.device, p.dtype) * scale
    if (k + step) % 4 == 1 and p.dim() == 2:
        return values.t().contiguous().t()
    if (k + step) % 7 == 1:
        return values.flatten()[:1].sum().expand(p.shape)  # stride 0
    # What autograd makes: the parameter's own strides.
    return torch.empty_like(p).copy_(values) if (k + step) % 2 else values.clone()


def give_gradients(params, step, plain=False):
    """Set every p.grad for this step; ``plain``: without the odd layouts, for what cannot write to them."""
    for k, p in enumerate(params):
        g = gradient(p.detach(), k, step)
        p.grad = g.contiguous().clone() if plain and g is not None else g


def in_two_groups(params, options):
    """Two groups with different numbers: what one of them lacks, the other has."""
    lr = options.get("lr", LR)
    second = {"lr": lr * 0.5, "weight_decay": options.get("weight_decay", 0) + 0.02}
    middle = len(params) // 2
    return [{"params": params[:middle]}, {"params": params[middle:], **second}]
