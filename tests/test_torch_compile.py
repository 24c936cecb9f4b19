"""torch.compile around a training step: one graph break where the optimizer steps, torch's numbers, nothing made anew.

``backend="eager"`` traces as every backend does, and needs no C++ compiler. The compiler sees nothing of a step, so two
optimizers stand for all.
"""

import pytest
import torch
from cases import give_gradients, interpreter_noise, model
from options import LR, STATEFUL
from pairs import Pair, clip, close
from torch._dynamo.utils import counters

import fusedopt


@pytest.fixture(autouse=True)
def nothing_compiled_before():
    torch._dynamo.reset()
    counters.clear()


def graphs():
    """How many graphs dynamo has made in this test."""
    return counters["stats"]["unique_graphs"]


def loss_of(params):
    return sum((p * p).sum() for p in params)


def compiled_training():
    """A training step, compiled anew."""

    @torch.compile(backend="eager")
    def train(optimizer, params):
        optimizer.zero_grad()
        loss = loss_of(params)
        loss.backward()
        optimizer.step()
        return loss

    return train


@pytest.mark.parametrize("name", ["AdamW", "SGD"])
def test_training_step(name, backend, device):
    pair = Pair(name, None, "tiny", device=device, backend=backend, max_grad_norm=2.0)

    train = compiled_training()
    for number in range(5):
        for p in pair.theirs:
            p.grad = None
        expected = loss_of(pair.theirs)
        expected.backward()
        clip(pair.theirs, pair.opt)
        pair.oracle.step()
        # The sum of a hundred squares in float64.
        torch.testing.assert_close(train(pair.opt, pair.ours), expected, rtol=1e-12, atol=0)
        if number == 1:
            made = graphs()
    assert graphs() == made
    pair.check()


def test_one_break():
    """What stands before and behind the step are two graphs, whole."""
    params = model("tiny")
    optimizer = fusedopt.AdamW(params)

    @torch.compile(backend="eager")
    def around(x):
        x = x.sin() + 1
        optimizer.step()
        return x.cos() * 2

    for number in range(4, 8):
        give_gradients(params, number, plain=True)
        optimizer.param_groups[0]["lr"] = 0.1 / number
        around(torch.ones(3))
        assert graphs() == 2


def test_step_itself():
    pair = Pair("AdamW", None, "tiny")
    step = torch.compile(pair.opt.step, backend="eager")
    for number in range(4, 8):
        give_gradients(pair.ours, number, plain=True)
        give_gradients(pair.theirs, number, plain=True)
        step()
        pair.oracle.step()
    pair.check()


def test_closure_hooks_and_schedulers():
    log = []
    pair = Pair("Adam", None, "tiny", groups=False)
    pair.opt.register_step_pre_hook(lambda *args: log.append("pre"))
    pair.opt.register_step_post_hook(lambda *args: log.append("post"))
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9) for optimizer in (pair.opt, pair.oracle)]

    def train(optimizer, params):
        def closure():
            optimizer.zero_grad()
            loss = loss_of(params)
            loss.backward()
            return loss

        return optimizer.step(closure)

    compiled = torch.compile(train, backend="eager")
    for _ in range(3):
        torch.testing.assert_close(compiled(pair.opt, pair.ours), train(pair.oracle, pair.theirs), rtol=1e-12, atol=0)
        for scheduler in schedulers:
            scheduler.step()
    assert log == ["pre", "post"] * 3
    pair.check()


@pytest.mark.parametrize("order", ["model first", "optimizer first", "in place"])
@pytest.mark.parametrize("flatten", [False, True], ids=["in place", "flatten"])
def test_compiled_model(order, flatten):
    """The optimizer made before or after the model was compiled, and a step between compiled calls."""
    results = []
    for cls, settings in ((fusedopt.AdamW, {"flatten": flatten, "max_grad_norm": 1.0}), (torch.optim.AdamW, {})):
        torch.manual_seed(0)
        module = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 1)).double()
        optimizer = cls(module.parameters(), lr=LR, **settings) if order == "optimizer first" else None
        if order == "in place":
            module.compile(backend="eager")
            compiled = module
        else:
            compiled = torch.compile(module, backend="eager")
        optimizer = optimizer or cls(compiled.parameters(), lr=LR, **settings)
        for _ in range(4):
            optimizer.zero_grad()
            (compiled(torch.linspace(-1, 1, 20, dtype=torch.float64).view(4, 5)) - 9).square().mean().backward()
            if cls is torch.optim.AdamW:
                torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimizer.step()
        results.append(list(module.parameters()))
    close(*results, 1e-12)


def test_a_step_that_raises_when_compiled():
    """The error is ours, nothing has changed, and mended it goes on."""
    params = model("tiny")
    optimizer = fusedopt.Adam(params)
    step = torch.compile(lambda: optimizer.step(), backend="eager")
    give_gradients(params, 5, plain=True)
    step()
    before = [p.detach().clone() for p in params]
    optimizer.state[params[1]]["exp_avg"] = torch.zeros(3, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"'exp_avg' of parameter 1"):
        step()
    assert all(map(torch.equal, before, params))
    optimizer.state[params[1]]["exp_avg"] = torch.zeros(7, 5, dtype=torch.float64)
    step()
    assert not torch.equal(before[1], params[1])


def test_fullgraph_is_refused():
    """As the README says; torch's own error names the step."""
    params = model("tiny")
    optimizer = fusedopt.SGD(params, **STATEFUL["SGD"])
    give_gradients(params, 5, plain=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="step"):
        torch.compile(lambda: optimizer.step(), backend="eager", fullgraph=True)()


def test_step_of_a_subclass_runs_once_when_compiled():
    class Counting(fusedopt.SGD):
        def step(self, closure=None):
            calls.append(1)
            return super().step(closure)

    calls = []
    params = model("tiny")
    optimizer = Counting(params, lr=0.1)
    give_gradients(params, 5)
    torch.compile(lambda: optimizer.step(), backend="eager")()
    assert len(calls) == 1


@interpreter_noise
def test_capturable(needs_triton, device):
    """The step count and the learning rate on the device: the same breaks, nothing compiled anew, the same numbers."""
    ended = []
    for capturable in (False, True):
        params = model("tiny", device=device)
        lr = torch.tensor(LR, dtype=torch.float64, device=device)
        optimizer = fusedopt.Adam(params, lr=lr, capturable=capturable, backend="triton", max_grad_norm=2.0)

        train = compiled_training()
        for number in range(5):
            lr.fill_(LR / (1 + number))
            train(optimizer, params)
            if number == 1:
                made = graphs()
        assert graphs() == made
        ended.append([*params, *(state["step"].cpu() for state in optimizer.state.values())])
    close(*ended, 1e-12)
