"""Optimizers whose steps are captured in graphs, and what such steps leave behind."""

import torch
from cases import give_gradients, in_two_groups, model
from graphs import capture
from options import STATEFUL
from pairs import assert_same, snapshot

import fusedopt


class Run:
    """An optimizer whose learning rates are tensors on the device, and gradients that stay where they are."""

    def __init__(self, name, device, kind="tiny", **settings):
        options = {**STATEFUL[name], "lr": 0.03}
        self.params = model(kind, torch.float32, device)
        groups = in_two_groups(self.params, options)
        self.rates = [torch.tensor(lr, dtype=torch.float64, device=device) for lr in (0.03, 0.015)]
        for group, rate in zip(groups, self.rates):
            group["lr"] = rate
        self.opt = fusedopt.registry[name](groups, **options, capturable=True, backend="triton", **settings)

    def prepare(self, number, broken=False):
        """The gradients and learning rates of a step."""
        before = [p.grad for p in self.params]
        give_gradients(self.params, number, plain=True)
        for p, g in zip(self.params, before):
            if p.grad is None:
                p.grad = torch.zeros_like(p)
            if g is not None:
                p.grad = g.copy_(p.grad)
        if broken:
            self.params[1].grad[0, 0] = float("inf")
        for rate in self.rates:
            rate.fill_(0.1 / (1 + number))

    def warm_up(self):
        for number in (4, 5):
            self.prepare(number)
            self.opt.step()

    def capture(self, monkeypatch):
        with capture(monkeypatch, self.opt._engine.executors) as graph:
            self.opt.step()
        return graph

    def seen(self):
        averages = [a.detach().clone() for a in self.opt._ema.values()]
        found = snapshot(self.opt)
        for group in found["groups"]:
            group["lr"] = float(group["lr"])
        metrics = [] if self.opt.track is None else list(self.opt.metrics)
        return found | {"params": found["params"] + averages + metrics}, self.opt.skipped_steps, self.opt.grad_norm


def assert_equal(a, b):
    (found, skipped, norm), (expected, others_skipped, others_norm) = a.seen(), b.seen()
    assert_same(found, expected)
    assert skipped == others_skipped
    assert norm is others_norm is None or torch.equal(norm, others_norm)


class Plain(Run):
    """Without ``capturable``."""

    def __init__(self, name, device, **options):
        self.params, self.rates = model("tiny", torch.float32, device), []
        self.opt = fusedopt.registry[name](self.params, backend="triton", **options)


def watch(optimizer):
    """On a CPU nobody looks for graphs where the host counts."""
    optimizer._engine.plan.may_be_captured = True
