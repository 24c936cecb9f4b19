"""What the kernel tests share: one case per rule, the chains around a rule, and the twin's step.

A rule without a case here fails ``test_every_rule_has_a_case``, so a new optimizer cannot escape.
"""

import inspect
import math
import sys

import torch

import fusedopt
from fusedopt import torch_stages
from fusedopt.means import terms as torch_terms
from fusedopt.rule import Rule

CASES = {
    "sgd": ("SGD", {}),
    "momentum": ("SGD", {"momentum": 0.9, "dampening": 0.1}),
    "momentum nesterov": ("SGD", {"momentum": 0.9, "nesterov": True}),
    "momentum_velocity": ("SGD", {"momentum": 0.9, "momentum_form": "velocity"}),
    "momentum_velocity nesterov": ("SGD", {"momentum": 0.9, "momentum_form": "velocity", "nesterov": True}),
    "momentum_average": ("SGD", {"momentum": 0.9, "momentum_form": "average"}),
    "momentum_average nesterov": ("SGD", {"momentum": 0.9, "momentum_form": "average", "nesterov": True}),
    "adagrad": ("Adagrad", {"lr_decay": 0.1, "initial_accumulator_value": 0.25}),
    "adagrad_eps_inside": ("Adagrad", {"eps": 0.1, "eps_inside_sqrt": True}),
    "rmsprop": ("RMSprop", {"alpha": 0.9}),
    "rmsprop_centered": ("RMSprop", {"centered": True}),
    "rmsprop_momentum": ("RMSprop", {"momentum": 0.9}),
    "rmsprop_centered_momentum": ("RMSprop", {"centered": True, "momentum": 0.9}),
    "rmsprop_eps_inside": ("RMSprop", {"eps": 0.1, "eps_inside_sqrt": True}),
    "rmsprop_centered_eps_inside": ("RMSprop", {"centered": True, "eps": 0.1, "eps_inside_sqrt": True}),
    "rmsprop_momentum_eps_inside": ("RMSprop", {"momentum": 0.9, "eps": 0.1, "eps_inside_sqrt": True}),
    "rmsprop_centered_momentum_eps_inside": (
        "RMSprop", {"centered": True, "momentum": 0.9, "eps": 0.1, "eps_inside_sqrt": True},
    ),
    "adam": ("Adam", {}),
    "adam uncorrected": ("Adam", {"bias_correction": False}),
    "adam_eps_inside": ("Adam", {"eps": 0.1, "eps_inside_sqrt": True}),
    "amsgrad": ("AdamW", {"amsgrad": True}),
    "lion": ("Lion", {}),
    "adan": ("Adan", {}),
    "ademamix": ("AdEMAMix", {"alpha_warmup": 10, "beta3_warmup": 10}),
    "adam limited": ("StableAdamW", {}),
    "adam adapted": ("LAMB", {}),
    "amsgrad_eps_inside": ("AdamW", {"amsgrad": True, "eps": 0.1, "eps_inside_sqrt": True}),
    "nadam": ("NAdam", {"momentum_decay": 0.1}),
    "radam": ("RAdam", {"betas": (0.9, 0.99)}),
    "adamax": ("Adamax", {}),
    "adadelta": ("Adadelta", {"rho": 0.8, "eps": 1e-3}),
    "asgd": ("ASGD", {"lambd": 0.0, "t0": -1.0}),  # the average mixes from the second step on
    "rprop": ("Rprop", {"lr": 2**-6}),  # the first step size, which 16 bits hold
}  # fmt: skip
"""The class and the options that select a rule. The name's first word is the rule's."""


VARIANTS = {"momentum_velocity", "momentum_average", *(case for case in CASES if case.endswith("_eps_inside"))}
"""Rules that differ from another one in their last line. Where a test asks what the compiler makes of a rule, one GPU
of each make will do for them. (On sm_80 and sm_100 ptxas parks one address of two of them, 8 bytes, in memory.)"""


def in_torch(name: str, options: dict) -> bool:
    return (
        hasattr(torch.optim, name) and options.keys() <= inspect.signature(getattr(torch.optim, name)).parameters.keys()
    )


AT_ONCE = ("adam", "amsgrad", "rmsprop_centered_momentum")
"""Cases that are compiled as one cooperative kernel too."""

IN_TORCH = [case for case, (name, options) in CASES.items() if in_torch(name, options)]

CHAINS = {
    "none": {},
    "clip norm": {"max_grad_norm": 0.5},
    "clip value": {"max_grad_value": 0.4},
    "clip below": {"max_grad_value": (-0.3, None)},
    "maximize": {"maximize": True},
    "L2 decay": {"weight_decay": 0.1, "decoupled": False},
    "decoupled decay": {"weight_decay": 0.1, "decoupled": True},
    "cautious": {"cautious": True, "weight_decay": 0.1, "decoupled": True, "max_grad_norm": 2.0},
    "all": {
        "weight_decay": 0.1, "decoupled": True, "maximize": True, "max_grad_norm": 2.0, "max_grad_value": (None, 0.01),
    },
}  # fmt: skip
"""What stands around the rule: settings of an optimizer, and ``decoupled`` for the place of the decay."""

WITH_MEANS = {"amsgrad": {"cautious": True}, "adam limited": {}, "adam adapted": {}}
"""Cases, and settings, in which a stage needs a mean. Those without settings always do."""

ADDRESSES = ("scattered", "flat")

# float32: a dozen roundings of 6e-8 at most, measured 3e-7. float64: as many of 1.1e-16, measured 4e-16; the bound
# leaves room for other seeds, and a number that went through float32 on its way would miss it by 1e4.
ONE_STEP = {torch.float32: 1e-6, torch.float64: 1e-12}


def shipped_optimizers() -> list[type]:
    """The registered classes without those that a test defines."""
    return [cls for cls in fusedopt.registry.values() if cls.__module__.startswith("fusedopt.")]


def declared_rules() -> dict[str, Rule]:
    """Every rule in a module that defines an optimizer."""
    modules = {sys.modules[cls.__module__] for cls in shipped_optimizers()}
    found = [value for module in modules for value in vars(module).values()]
    found += [value for table in found if isinstance(table, dict) for value in table.values()]
    return {value.name: value for value in found if isinstance(value, Rule)}


def kernel_rules() -> set[str]:
    """Every rule in kernels/rules.py: what takes exactly a gradient, a state and numbers."""
    from fusedopt import kernels

    return {name for name, fn in vars(kernels.rules).items() if getattr(fn, "arg_names", None) == ["g", "state", "h"]}


def tensors(sizes, device, dtype=torch.float32, seed=0, scale=1.0):
    """The same numbers on every device."""
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(size, generator=generator) * scale).to(device, dtype) for size in sizes]


def parameters(*args, **kwargs):
    return [torch.nn.Parameter(t) for t in tensors(*args, **kwargs)]


def optimizer(case, params, address="scattered", decoupled=None, **settings):
    """An optimizer that runs this case's rule in kernels."""
    name, options = CASES[case]
    settings = {"lr": 0.02, "weight_decay": 0.0, "backend": "triton"} | options | settings
    weight_decay = settings["weight_decay"]
    made = fusedopt.registry[name](params, flatten=address == "flat", **accepted(name, settings))
    if decoupled is not None:
        # Also for optimizers that have no such option: the chains are the engine's, not the rule's.
        made.decays = lambda group: (0.0, weight_decay) if decoupled else (weight_decay, 0.0)
    return made


def accepted(name, options):
    """Without the weight decay, where the optimizer has none."""
    known = inspect.signature(fusedopt.registry[name]).parameters
    return {key: value for key, value in options.items() if key != "weight_decay" or key in known}


def states(made, p):
    """The state tensors of one parameter, in the order in which its rule takes them, and its averages."""
    (group,) = (group for group in made.param_groups if any(p is q for q in group["params"]))
    keys = made.rule(group).keys
    initial = {key: torch.full_like(p, made.initial_value(group, key)) for key in keys}
    return [made.state.get(p, initial).get(key, initial[key]).detach() for key in keys]


def scalars(made, group, p):
    """The numbers that stand beside one parameter's step count."""
    state = made.state.get(p, {})
    values = (state.get(key, made.initial_value(group, key)) for key in made.rule(group).scalars)
    return [torch.as_tensor(value) for value in values]


def twin_step(made, t):
    """Where the t-th step should lead: [param, *states] per parameter, by the torch twins in float64.

    To be called before that step. Parameters, gradients and states are the optimizer's own.
    """
    groups = made.param_groups
    squares = sum(p.grad.double().square().sum().item() for group in groups for p in group["params"])
    max_norm = made.max_grad_norm
    factor = 1.0 if max_norm is None else min(1.0, max_norm / (math.sqrt(squares) + 1e-6))
    expected = []
    for group in groups:
        rule = made.rule(group)
        for p in group["params"]:
            value, g, *state = (x.detach().double() for x in (p, p.grad, *states(made, p)))
            # float64 tensors of a float64 optimizer are its own: the twin writes to its arguments.
            state = [s.clone() for s in state]
            update = made.update(group, t, *scalars(made, group, p))
            g = torch_stages.through(update.on_grad, g * factor, value)
            kept = state[: len(rule.states)]
            u = rule.twin(g, kept, update.h)
            means = [
                torch_terms[term](u, value, g, kept, *stage.args).mean()
                for stage in update.on_update
                for term in stage.terms
            ]
            value = value - update.lr * torch_stages.through(update.on_update, u, value, g, means)
            for average, weight in zip(state[len(rule.states) :], update.averages):
                average.lerp_(value, weight)
            expected.append([value, *state])
    return expected


def results(made):
    """[param, *states] per parameter, as copies."""
    params = [p for group in made.param_groups for p in group["params"]]
    return [[x.detach().clone() for x in (p, *states(made, p))] for p in params]


def assert_as_twin(made, expected):
    """Each role's values within ``ONE_STEP`` of the expected ones; those near zero, where terms cancelled, within
    that part of the role's typical size."""
    for role, (got, wanted) in enumerate(zip(zip(*results(made)), zip(*expected))):
        assert all(x.shape == y.shape for x, y in zip(got, wanted))
        x, y = (torch.cat([part.flatten() for part in parts]) for parts in (got, wanted))
        bound = ONE_STEP[x.dtype]
        # A state may still be zero: Adan's average of differences at the first step.
        error = (x.double() - y).abs() / (y.abs() + y.abs().mean()).clamp(min=torch.finfo(y.dtype).tiny)
        where = f"state {role}" if role else "parameter"
        assert (error <= bound).all(), f"{where}: off by {error.max().item():.3g}, not {bound}"


def set_gradients(params, grads):
    for p, g in zip(params, grads):
        p.grad = g


def bits(x):
    """A tensor's bit patterns, so that NaN and the sign of zero count."""
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return x.detach().contiguous().view(integers[x.element_size()])


def same_bits(a, b):
    return a.dtype == b.dtype and torch.equal(bits(a), bits(b))
