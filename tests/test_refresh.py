"""optimizer.refresh(): replays of a CUDA graph go on with the options that the groups have by then."""

import pytest
import torch
from cases import give_gradients, interpreter_noise, model
from graph_runs import Plain, Run, assert_equal, watch
from options import STATEFUL
from pairs import assert_same

import fusedopt

pytestmark = pytest.mark.usefixtures("needs_triton")


class Floats(Run):
    """Learning rates are numbers, which a graph freezes."""

    def __init__(self, name, device, **settings):
        super().__init__(name, device, **settings)
        self.rates = []
        for group, lr in zip(self.opt.param_groups, (0.03, 0.015)):
            group["lr"] = lr


def change(optimizer, lr):
    for k, group in enumerate(optimizer.param_groups):
        group["lr"] = lr * (k + 1)
        for key in ("eps", "weight_decay"):
            # Adan's goes with the learning rate into what the device computes.
            if group.get(key) and "no_prox" not in group:
                group[key] *= 1.5


@interpreter_noise
@pytest.mark.parametrize("name", ["ASGD", "Adagrad", "Adam", "Adan"])
def test_replays_go_on_with_the_new_options(name, device, monkeypatch):
    """To the bit as eager steps do; and until it is called with the old ones."""
    eager, captured = (Floats(name, device, max_grad_norm=3.0, ema_decay=0.9) for _ in range(2))
    for run in (eager, captured):
        run.warm_up()
        run.prepare(6)
    graph = captured.capture(monkeypatch)
    for number in range(6, 11):
        for run in (eager, captured):
            run.prepare(number)
        if number == 7:
            change(captured.opt, 0.5)
        if number == 9:
            change(eager.opt, 0.5)
            captured.opt.refresh()
        if number == 10:
            for run in (eager, captured):
                change(run.opt, 0.01)
            captured.opt.refresh()
        eager.opt.step()
        graph.replay()
        if number not in (7, 8):
            assert_equal(captured, eager)


@interpreter_noise
def test_without_a_count(device, monkeypatch):
    eager, captured = (Plain("SGD", device, momentum=0.9, lr=0.1, weight_decay=0.1) for _ in range(2))
    for run in (eager, captured):
        run.warm_up()
        run.prepare(6)
        watch(run.opt)
    graph = captured.capture(monkeypatch)
    for number in range(6, 9):
        for run in (eager, captured):
            run.prepare(number)
            change(run.opt, 0.1 / number)
            run.opt.param_groups[0]["momentum"] = 0.9 - 0.01 * number
        captured.opt.refresh()
        eager.opt.step()
        graph.replay()
        assert all(map(torch.equal, eager.params, captured.params))


BAKED = {
    "betas": lambda o: o.param_groups[0].update(betas=(0.5, 0.6)),
    "weight_decay|no effect": lambda o: [group.update(weight_decay=0.0) for group in o.param_groups],
    "formula": lambda o: [group.update(amsgrad=not group["amsgrad"]) for group in o.param_groups],
    "max_grad_norm": lambda o: setattr(o, "max_grad_norm", 1.0),
    "learning rate is not the tensor": lambda o: o.param_groups[0].update(lr=torch.tensor(0.5)),
}


@interpreter_noise
@pytest.mark.parametrize("message", BAKED)
def test_what_the_graph_has_for_good(message, device, monkeypatch):
    """Nothing is changed, nor is the first of the groups."""
    run = (Run if "tensor" in message else Floats)("Adam", device, max_grad_norm=3.0)
    run.warm_up()
    run.prepare(6)
    graph = run.capture(monkeypatch)
    run.opt.param_groups[0]["eps"] *= 2
    BAKED[message](run.opt)
    memory = [x.clone() for x in memories(run.opt)]
    before = run.seen()[0]
    with pytest.raises(RuntimeError, match=f"({message}).*capture the graph again"):
        run.opt.refresh()
    assert memory
    assert all(map(torch.equal, memories(run.opt), memory))
    assert_same(run.seen()[0], before)
    graph.replay()


@interpreter_noise
@pytest.mark.parametrize("message", ["betas", "max_grad_norm"])
def test_a_graph_that_was_captured_again(message, device, monkeypatch):
    """The earlier one is left alone, with a warning: who knows whether it is still replayed."""
    eager, captured = (Floats("Adam", device, max_grad_norm=3.0) for _ in range(2))
    for run in (eager, captured):
        run.warm_up()
        run.prepare(6)
    captured.capture(monkeypatch)
    for run in (eager, captured):
        BAKED[message](run.opt)
        run.opt.step()
    graph = captured.capture(monkeypatch)
    for run in (eager, captured):
        run.opt.param_groups[1]["lr"] = 0.5
    with pytest.warns(UserWarning, match=f"another was captured later: .*{message}"):
        captured.opt.refresh()
    eager.opt.step()
    graph.replay()
    assert_equal(captured, eager)


def memories(optimizer):
    """What the host keeps for the graphs' replays."""
    for one in optimizer._engine.captured:
        for executor in one.executors:
            for _, families in executor.rows.graphs:
                for frozen in families:
                    yield from (x for x in (frozen.constants, frozen.rates) if x is not None)


def test_nothing_is_frozen_without_graphs(backend, device):
    params = model("tiny", device=device)
    optimizer = fusedopt.AdamW(params, **STATEFUL["AdamW"], backend=backend)
    optimizer.refresh()
    give_gradients(params, 5)
    optimizer.step()
    optimizer.refresh()
