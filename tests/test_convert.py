"""``fusedopt.convert``: torch's optimizer goes on as the fused one, and whoever holds it notices nothing."""

import copy
import math
import pickle
import warnings

import pytest
import torch
from cases import give_gradients, in_two_groups, model
from options import IN_TORCH, LR, STATEFUL
from pairs import assert_same, clip, close, close_states, snapshot
from torch.optim import lr_scheduler

import fusedopt

every_class = pytest.mark.parametrize("name", IN_TORCH)


class Named(torch.optim.AdamW):
    """A subclass as users write them: options, attributes and methods of its own, and torch's step."""

    def __init__(self, params, label="mine", **options):
        super().__init__(params, **options)
        self.label = label

    def zero_grad(self, set_to_none=False):
        super().zero_grad(set_to_none)
        self.zeroed = True

    def state_dict(self):
        return {**super().state_dict(), "label": self.label}

    def describe(self):
        return f"{self.label} of {len(self.param_groups)} groups"


def pair_of(cls, options, device="cpu", kind="tiny"):
    """Two equal torch optimizers on equal parameters."""
    options = {"lr": LR, **options}
    made = []
    for _ in range(2):
        params = model(kind, device=device)
        made.append((params, cls(in_two_groups(params, options), **options, foreach=False)))
    return made


def steps(pairs, numbers, settings=None):
    for number in numbers:
        for params, _ in pairs:
            give_gradients(params, number, plain=True)
        for params, optimizer in pairs:
            if settings is not None and not isinstance(optimizer, fusedopt.FusedOptimizer):
                clip(params, settings)
            optimizer.step()


@every_class
@pytest.mark.parametrize("before", [0, 1, 3])
def test_goes_on_as_torch_would(name, before, backend, device):
    if backend == "triton" and device.type == "cpu" and before != 1:
        return  # the interpreter is slow, and the kernels see no difference
    ours, theirs = pair_of(getattr(torch.optim, name), STATEFUL[name], device)
    steps((ours, theirs), range(4, 4 + before))
    optimizer = ours[1]
    bits = snapshot(optimizer)
    objects = [optimizer.param_groups, optimizer.state, optimizer.defaults, *optimizer.param_groups]
    objects += [s for state in optimizer.state.values() for s in state.values()]
    assert fusedopt.convert(optimizer, max_grad_norm=3.0, backend=backend) is optimizer
    assert type(optimizer) is fusedopt.registry[name]
    now = [optimizer.param_groups, optimizer.state, optimizer.defaults, *optimizer.param_groups]
    now += [s for state in optimizer.state.values() for s in state.values()]
    assert all(a is b for a, b in zip(objects, now, strict=True))
    assert_same(bits, snapshot(optimizer))
    assert repr(optimizer) == repr(theirs[1])
    steps((ours, theirs), range(4 + before, 9), settings=optimizer)
    assert f"backend {backend}" in optimizer.layout()
    close(ours[0], theirs[0], 1e-12)
    close_states(optimizer, theirs[1], 1e-12)


def test_hooks_stay():
    (params, optimizer), _ = pair_of(torch.optim.Adam, {})
    log = []

    def note(text):
        return lambda *args: log.append((text, args[0] is optimizer))

    handles = [
        optimizer.register_step_pre_hook(note("pre")),
        optimizer.register_step_post_hook(note("post")),
        optimizer.register_state_dict_pre_hook(note("save pre")),
        optimizer.register_state_dict_post_hook(note("save post")),
        optimizer.register_load_state_dict_pre_hook(note("load pre")),
        optimizer.register_load_state_dict_post_hook(note("load post")),
    ]
    fusedopt.convert(optimizer)
    give_gradients(params, 5)
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    texts = ["pre", "post", "save pre", "save post", "load pre", "load post"]
    assert log == [(text, True) for text in texts]
    for handle in handles:
        handle.remove()
    optimizer.step()
    assert len(log) == 6


SCHEDULERS = {
    "OneCycle": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=9),
    "Sequential": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, 0.5, 3), lr_scheduler.ExponentialLR(o, 0.7)], [3]
    ),
    "Plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0, factor=0.3),
}


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("before", [0, 2])
def test_schedulers_made_before(scheduler, before):
    """They hold the same object, and still see that it steps before they do."""
    pairs = pair_of(torch.optim.AdamW, {})
    schedulers = [SCHEDULERS[scheduler](optimizer) for _, optimizer in pairs]
    arguments = (1.0,) if scheduler == "Plateau" else ()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for number in range(6):
            if number == before:
                fusedopt.convert(pairs[0][1])
            steps(pairs, [4 + number])
            for each in schedulers:
                each.step(*arguments)
    assert schedulers[0].optimizer is pairs[0][1]
    assert "adam" in pairs[0][1].layout()
    assert schedulers[0].get_last_lr() == schedulers[1].get_last_lr()
    close(pairs[0][0], pairs[1][0], 1e-12)


def test_a_scheduler_still_warns_when_it_comes_first():
    (params, optimizer), _ = pair_of(torch.optim.SGD, {})
    scheduler = lr_scheduler.StepLR(optimizer, 1)
    fusedopt.convert(optimizer)
    with pytest.warns(UserWarning, match="before `optimizer.step"):
        scheduler.step()
    other = lr_scheduler.StepLR(optimizer, 1)  # which does not wrap it again
    give_gradients(params, 5)
    optimizer.step()
    assert optimizer._opt_called
    other.step()


def test_gradient_scaler_in_the_midst():
    pairs = pair_of(torch.optim.Adam, {})
    scalers = [torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2) for _ in pairs]
    for number in range(5):
        for (params, optimizer), scaler in zip(pairs, scalers):
            if number == 2 and params is pairs[0][0]:
                fusedopt.convert(optimizer)
            optimizer.zero_grad()
            scaler.scale(sum((p * p).sum() for p in params) * (math.inf if number == 3 else 1.0)).backward()
            scaler.step(optimizer)
            scaler.update()
    assert scalers[0].state_dict() == scalers[1].state_dict()
    assert "adam" in pairs[0][1].layout()
    close(pairs[0][0], pairs[1][0], 1e-12)


def test_subclass_keeps_what_it_adds():
    pairs = pair_of(Named, {"label": "first"})
    steps(pairs, range(4, 6))
    optimizer = fusedopt.convert(pairs[0][1], max_grad_norm=2.0)
    assert isinstance(optimizer, Named)
    assert isinstance(optimizer, fusedopt.AdamW)
    assert type(optimizer).__name__ == "Named"
    assert optimizer.describe() == "first of 2 groups"
    assert optimizer.state_dict()["label"] == "first"
    steps(pairs, range(6, 8), settings=optimizer)
    close(pairs[0][0], pairs[1][0], 1e-12)
    for carry in (copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))):
        params, duplicate = carry((pairs[0][0], optimizer))
        assert type(duplicate) is type(optimizer)
        assert duplicate.max_grad_norm == 2.0
        give_gradients(params, 7)
        duplicate.zero_grad()
        assert duplicate.zeroed
        assert not params[1].grad.any()
        _, expected = copy.deepcopy(pairs[1])
        theirs = expected.param_groups[0]["params"] + expected.param_groups[1]["params"]
        steps([(params, duplicate), (theirs, expected)], range(8, 10), settings=optimizer)
        close(params, theirs, 1e-12)
    # The class of the original is what it was.
    give_gradients(pairs[1][0], 9)
    pairs[1][1].step()
    assert not isinstance(pairs[1][1], fusedopt.FusedOptimizer)
    assert fusedopt.registry["AdamW"] is fusedopt.AdamW
    assert "Named" not in fusedopt.registry


def test_subclass_whose_step_torch_wrapped_first():
    """torch puts the wrapper that runs hooks into the first class of which there is an instance."""

    class First(Named):
        step = torch.optim.Optimizer.profile_hook_step(torch.optim.AdamW.step.__wrapped__)
        step.hooked = True

    pairs = pair_of(First, {})
    calls = []
    pairs[0][1].register_step_post_hook(lambda *args: calls.append(1))
    fusedopt.convert(pairs[0][1])
    steps(pairs, range(4, 7))
    assert len(calls) == 3
    assert "adam" in pairs[0][1].layout()
    close(pairs[0][0], pairs[1][0], 1e-12)
