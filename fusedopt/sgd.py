"""Stochastic gradient descent, with or without momentum.

    u = g                                                       p <- p - lr u

    momentum, in the form that ``momentum_form`` names:
    accumulated     b <- mu b + (1 - dampening) g, but b_1 = g      p <- p - lr b               torch's
    velocity        v <- mu v - lr g                                p <- p + v
    average         m <- mu m + (1 - mu) g                          p <- p - lr m

    nesterov: the gradient is that of the point to which momentum alone would lead, and p is that point
    accumulated     u = g + mu b        velocity    p <- p + mu v - lr g        average     u = (1 - mu) g + mu m

``weight_decay * p`` is added to g before the rule. The forms differ as soon as lr changes: what was collected keeps
the old lr in "velocity" alone. Their states have names of their own (``velocity``, ``grad_avg``), so that torch's
``momentum_buffer`` never means another thing; only "accumulated" has ``dampening``.

Sources: Polyak (1964), momentum as a velocity; Sutskever et al., "On the importance of initialization and momentum
in deep learning" (2013), Nesterov's as a look-ahead; accumulated, defaults and state: torch.optim 2.13.
"""

from __future__ import annotations

import dataclasses
import math

import torch

from .capture import CapturableSettings
from .columns import number, where
from .optimizer import FusedOptimizer
from .rule import EVERY_DTYPE, Rule
from .setting_checks import one_of
from .settings import setting
from .widened import COPIED, widened


def sgd(g, state, h):
    return g


def momentum(g, state, h):
    b = state[0]
    mu, weight, nesterov, first = h
    if first:
        b.copy_(g)
    else:
        b.mul_(mu).add_(g, alpha=weight)
    return g.add(b, alpha=mu) if nesterov else b


def momentum_velocity(g, state, h):
    v = state[0]
    mu, lr, nesterov = h
    v.mul_(mu).add_(g, alpha=-lr)
    return g.mul(lr).sub_(v, alpha=mu) if nesterov else v.neg()


def momentum_average(g, state, h):
    m = state[0]
    mu, weight, nesterov = h
    m.lerp_(g, weight)
    return g.mul(weight).add_(m, alpha=mu) if nesterov else m


def fused_plain(params, grads, states, t, group, scale, rates):
    """p <- p - rate (g / scale + weight_decay p), or with -g for ``maximize``, by the fastest of torch's calls."""
    factor = (-1 if group["maximize"] else 1) / (1 if scale is None else scale.item())
    if params[0].dtype.itemsize < 4:
        _narrow(params, grads, group, scale, factor, rates)
    elif group["weight_decay"] != 0:
        _decayed(params, grads, group, scale, rates)
    else:
        _added(params, grads, group, factor, rates)


def _decayed(params, grads, group, scale, rates):
    for some in [slice(None)] if _alike(rates) else [slice(k, k + 1) for k in range(len(params))]:
        _fused_sgd(params[some], grads[some], [], group, scale, rates[some][0])


def _added(params, grads, group, factor, rates):
    """Without decay the gradient occurs once: scaled through the learning rate, it need not be written."""
    if len(params) < MANY or not _alike(rates):
        for p, g, lr in zip(params, grads, rates):
            p.add_(g, alpha=-lr * factor)
    elif torch.get_num_threads() == 1 and _small(params):
        _fused_sgd(params, grads, [], group, None, rates[0] * abs(factor))
    else:
        torch._foreach_add_(params, grads, alpha=-rates[0] * factor)


def _alike(rates):
    return rates.count(rates[0]) == len(rates)


def _narrow(params, grads, group, scale, factor, rates):
    # torch's fused kernel leaves whole SIMD blocks unchanged (torch issue 191763), its addition rounds the product too.
    if group["weight_decay"] == 0:
        one = torch.ones((), dtype=params[0].dtype, device="cpu")
        torch._foreach_addcmul_(params, grads, [one] * len(params), [-lr * factor for lr in rates])
        return
    for p, g, lr in zip(params, grads, rates):
        for p_block, g_block in zip(*(x.view(-1).split(COPIED) for x in (p, g))):
            wide, wide_g = widened([p_block, g_block], torch.float32)
            _fused_sgd([wide], [wide_g], [], group, scale, lr)
            p_block.copy_(wide)


def fused(params, grads, states, t, group, scale):
    _fused_sgd(params, grads, states[0], group, scale, float(group["lr"]), is_first_step=t == 1)


def _fused_sgd(params, grads, buffers, group, scale, lr, is_first_step=False):
    torch._fused_sgd_(
        params, grads, buffers, lr=lr, momentum=float(group["momentum"]), dampening=float(group["dampening"]),
        weight_decay=float(group["weight_decay"]), nesterov=bool(group["nesterov"]),
        maximize=bool(group["maximize"]), is_first_step=is_first_step, grad_scale=scale,
    )  # fmt: skip


def _small(params):
    # Looking at every one of them would take a tenth of the step; an odd stride sees weights and biases in turn.
    some = params[:: len(params) // MANY | 1]
    return sum(map(torch.Tensor.numel, some)) < SMALL * len(some)


MANY, SMALL = 8, 32768
"""Tensors from which a call for all of them is worth looking for, and the average of elements below which the fused
kernel is that call on one thread."""


def fused_average(params, grads, states, t, group, scale):
    """torch's buffer with dampening mu and no special first step."""
    fused(params, grads, states, 0, {**group, "dampening": group["momentum"]}, scale)


PLAIN = Rule("sgd", (), sgd, fused_plain, EVERY_DTYPE, takes_rates=True, list_threads=math.inf)
MOMENTUM = Rule("momentum", ("momentum_buffer",), momentum, fused, list_threads=1)
VELOCITY = Rule("momentum_velocity", ("velocity",), momentum_velocity)
AVERAGE = Rule("momentum_average", ("grad_avg",), momentum_average, fused_average, list_threads=1)
AVERAGE_AHEAD = AVERAGE._replace(fused=None)
FORMS = {"accumulated": MOMENTUM, "velocity": VELOCITY, "average": AVERAGE}


@dataclasses.dataclass(kw_only=True)
class SGDSettings(CapturableSettings):
    momentum_form: str = setting(
        "accumulated",
        one_of(*FORMS),
        """("accumulated" | "velocity" | "average"): what momentum collects, see the formulas above.""",
    )


class SGD(FusedOptimizer, torch.optim.SGD):
    """SGD, with torch.optim.SGD's arguments and defaults."""

    # torch keeps no step count for SGD: whether the buffer exists is all that the formula needs.
    counts_steps = False
    settings_class = SGDSettings
    momentum_form: str
    capturable: bool

    def rule(self, group):
        form, mu = self._settings.momentum_form, group["momentum"]
        if mu == 0:
            return PLAIN
        if form == "accumulated":
            return MOMENTUM
        if group["dampening"] != 0:
            raise ValueError(
                f"momentum_form={form!r} has no dampening, got dampening={group['dampening']}; leave it 0, "
                "or take momentum_form='accumulated'"
            )
        if form == "average" and mu > 1:
            raise ValueError(f"momentum_form='average' needs a momentum between 0 and 1, got momentum={mu}")
        return AVERAGE_AHEAD if form == "average" and group["nesterov"] else FORMS[form]

    def hyper(self, group, t):
        mu, nesterov = float(group["momentum"]), float(bool(group["nesterov"]))
        if mu == 0:
            return ()
        match self._settings.momentum_form:
            case "accumulated":
                return mu, 1 - float(group["dampening"]), nesterov, where(t == 1, 1.0, 0.0)
            case "velocity":
                return mu, number(group["lr"]), nesterov
            case "average":
                return mu, 1 - mu, nesterov

    def lr(self, group, t):
        # A velocity holds the learning rates of its steps.
        inside = self._settings.momentum_form == "velocity" and group["momentum"] != 0
        return 1.0 if inside else number(group["lr"])
