"""A kernel that cannot run on this GPU: torch takes the step, as long as nothing was changed; otherwise its error."""

import copy
import re
import warnings

import device as benchmarks
import pytest
import torch
from cases import give_gradients, interpreter_noise, model
from options import IN_TORCH, LR, STATEFUL
from pairs import close, close_states, snapshot

import fusedopt
from fusedopt import backends, engine, torch_step, triton_backend
from fusedopt.launch import Launches

pytestmark = [interpreter_noise, pytest.mark.usefixtures("needs_triton")]


class OutOfResources(Exception):
    """As Triton's."""


class Broken:
    """Kernels that cannot be launched, by name, and how often that was tried."""

    def __init__(self):
        self.kernels, self.tried = {}, 0

    def launch(self, original):
        def launch(launches, known, kernel, *args):
            if kernel.__name__ in self.kernels:
                self.tried += 1
                raise self.kernels[kernel.__name__]
            original(launches, known, kernel, *args)

        return launch


@pytest.fixture
def broken(monkeypatch):
    """By default kernels run here, also in the interpreter, and torch's own step is what is left to torch."""
    monkeypatch.setattr(backends, "_device_problem", lambda device, requested: None)
    monkeypatch.setattr(torch_step, "FALLBACK_IS_FOR", {"meta"})
    found = Broken()
    monkeypatch.setattr(Launches, "_launch", found.launch(Launches._launch))
    return found


def out_of_shared_memory(*names):
    return dict.fromkeys(names, OutOfResources("out of resource: shared memory\nRequired: 300000"))


def pair(name, device, **settings):
    """Ours and torch.optim's on equal parameters."""
    options = {"lr": LR, **STATEFUL[name]}
    params = [model("tiny", device=device) for _ in range(2)]
    ours = fusedopt.registry[name](params[0], **options, **settings)
    return params, ours, getattr(torch.optim, name)(params[1], **options)


def train(params, optimizers, numbers, before=lambda theirs: None):
    """The same steps; ``before`` torch's, what clips its gradients."""
    for number in numbers:
        for its in params:
            give_gradients(its, number, plain=True)
        optimizers[0].step()
        before(params[1])
        optimizers[1].step()


WARNING = (
    r"^the kernel step of \w+ failed \(OutOfResources: out of resource: shared memory\): torch takes the steps on "
)


@pytest.mark.parametrize("name", IN_TORCH)
def test_the_first_step_is_torchs(name, broken, device):
    params, ours, theirs = pair(name, device)
    broken.kernels = out_of_shared_memory("step")
    with pytest.warns(UserWarning, match=WARNING) as warned:
        train(params, (ours, theirs), range(4, 8))
    assert len(warned) == 1 and warned[0].filename == __file__
    assert broken.tried == 1
    assert re.search("own step: .*the kernel step of .* failed", ours.layout())
    assert all(torch.equal(p, q) for p, q in zip(*params))
    close_states(ours, theirs, 0)


def test_what_torch_cannot_do_is_done_by_its_operations(broken, device):
    params, ours, theirs = pair("Adam", device, max_grad_norm=1.0)
    broken.kernels = out_of_shared_memory("sum_of_squares")
    with pytest.warns(UserWarning, match="the kernel sum_of_squares failed"):
        train(params, (ours, theirs), range(4, 8), lambda its: torch.nn.utils.clip_grad_norm_(its, 1.0))
    assert broken.tried == 1
    assert re.search(r"amsgrad on .*backend torch \(the kernel sum_of_squares failed", ours.layout())
    close(*params, 1e-6)  # clip_grad_norm_ multiplies float64 gradients by a factor of its own rounding


def test_steps_that_kernels_took_before_are_kept(broken, device):
    """Another setting needs another kernel."""
    params, ours, theirs = pair("AdamW", device)
    train(params, (ours, theirs), range(4, 7))
    broken.kernels = out_of_shared_memory("step")
    ours.max_grad_value = 0.5
    with pytest.warns(UserWarning, match=WARNING):
        train(params, (ours, theirs), range(7, 10), lambda its: torch.nn.utils.clip_grad_value_(its, 0.5))
    close(*params, 1e-12)
    close_states(ours, theirs, 1e-12)


@pytest.mark.parametrize("name", ["AdamW", "SGD"])
def test_a_norm_that_was_taken_before_the_step_is_heeded(name, broken, device, monkeypatch):
    """``clip_grad_norm_`` by kernels, and then the update cannot be compiled."""
    params, ours, theirs = pair(name, device)

    def fail_first(executors, *step):
        calls.append(executors[0].bucket.backend.name)
        if len(calls) == 1:
            raise backends.KernelFailed("step of adam", params[0][0].device, RuntimeError("ptxas"))

    calls = []
    monkeypatch.setattr(engine, "compile_ahead", fail_first)
    for its in params:
        give_gradients(its, 4, plain=True)
    norm = ours.clip_grad_norm_(0.1)
    with pytest.warns(UserWarning, match="the kernel step of adam failed"):
        ours.step()
    assert calls == ["triton", "torch"]
    expected = torch.nn.utils.clip_grad_norm_(params[1], 0.1)
    theirs.step()
    close([norm, *params[0]], [expected, *params[1]], 1e-6)


def test_a_norm_that_cannot_be_taken_before_the_step_is_torchs(broken, device):
    params, ours, theirs = pair("SGD", device)
    broken.kernels = out_of_shared_memory("sum_of_squares")
    for its in params:
        give_gradients(its, 4, plain=True)
    with pytest.warns(UserWarning, match="the kernel sum_of_squares failed"):
        norm = ours.clip_grad_norm_(0.1)
    assert torch.equal(norm, torch.nn.utils.clip_grad_norm_(params[1], 0.1))
    train(params, (ours, theirs), range(5, 7))
    assert all(torch.equal(p, q) for p, q in zip(*params))


def test_gradient_release(broken, device):
    module = torch.nn.Linear(3, 2).to(device)
    optimizer = fusedopt.SGD(module.parameters(), lr=0.5)
    fusedopt.enable_gradient_release(module, optimizer)
    before = module.bias.detach().clone()
    broken.kernels = out_of_shared_memory("step")
    with pytest.warns(UserWarning, match=WARNING) as warned:
        for _ in range(2):
            module(torch.ones(1, 3, device=device)).sum().backward()
    assert torch.equal(module.bias, before - 1.0) and len(warned) == broken.tried == 1


@pytest.mark.parametrize("error", [KeyboardInterrupt(), torch.OutOfMemoryError("out of memory")], ids=repr)
def test_what_is_no_fault_of_the_kernel_is_raised(error, broken, device):
    params, ours, _ = pair("Adam", device)
    give_gradients(params[0], 4)
    broken.kernels = {"step": error}
    with warnings.catch_warnings(), pytest.raises(type(error)) as raised:
        warnings.simplefilter("error")
        ours.step()
    assert raised.value is error


def test_where_kernels_are_asked_for_it_is_an_error(broken, device):
    params, ours, theirs = pair("Adam", device, backend="triton")
    broken.kernels = out_of_shared_memory("step")
    give_gradients(params[0], 4)
    with pytest.raises(OutOfResources, match="shared memory"):
        ours.step()
    broken.kernels = {}
    train(params, (ours, theirs), range(4, 7))
    close(*params, 1e-12)


def test_the_users_own_rule_says_what_is_wrong_with_it(broken, device):
    class Mine(fusedopt.Lion):
        def rule(self, group):
            rule = super().rule(group)
            return rule._replace(kernel=getattr(triton_backend.rules, rule.name))

    params = model("tiny", device=device)
    ours = Mine(params, lr=0.1)
    give_gradients(params, 4)
    broken.kernels = out_of_shared_memory("step")
    with pytest.raises(OutOfResources, match="shared memory"):
        ours.step()


def test_what_was_changed_stays_an_error(broken, device, monkeypatch):
    """The second of two dtypes; and an update after the device has judged, and counted, the step."""
    params = [torch.nn.Parameter(torch.ones(3, device=device, dtype=d)) for d in (torch.float32, torch.float64)]
    two = fusedopt.Adam(params, lr=0.1)
    for p in params:
        p.grad = torch.ones_like(p)
    step = triton_backend.Executor.step

    def then_break(executor, *args):
        step(executor, *args)
        broken.kernels = out_of_shared_memory("step")

    with monkeypatch.context() as patch, pytest.raises(OutOfResources):
        patch.setattr(triton_backend.Executor, "step", then_break)
        two.step()
    one = fusedopt.Adam(params[:1], lr=0.1, skip_nonfinite=True)
    before = snapshot(one)["params"]
    with pytest.raises(OutOfResources):
        one.step()
    assert all(map(torch.equal, before, snapshot(one)["params"]))


def test_benchmarks_do_not_time_torch_instead(broken, device):
    with warnings.catch_warnings():
        benchmarks.device(device.type)
        for settings in ({}, {"max_grad_norm": 1.0}):
            params, ours, _ = pair("Adam", device, **settings)
            give_gradients(params[0], 4)
            broken.kernels = out_of_shared_memory("step" if not settings else "sum_of_squares")
            with pytest.raises(UserWarning, match="torch takes the steps"):
                ours.step()


def test_one_launch_becomes_two(broken, device, monkeypatch):
    monkeypatch.setattr(triton_backend.Executor, "prefers_one_launch", True)
    broken.kernels = out_of_shared_memory("clipped_step")
    params, ours, theirs = pair("Adam", device, max_grad_norm=1.0)
    with pytest.warns(UserWarning, match="the kernel clipped_step of amsgrad failed .* two launches on"):
        train(params, (ours, theirs), range(4, 7), lambda its: torch.nn.utils.clip_grad_norm_(its, 1.0))
    assert broken.tried == 1 and "backend triton" in ours.layout()
    close(*params, 1e-6)
    ours.launches = 1
    give_gradients(params[0], 7)
    with pytest.raises(
        RuntimeError, match=r"launches=1 is not possible here: the kernel clipped_step of amsgrad failed"
    ):
        ours.step()


def test_kernels_are_tried_again_where_they_are_asked_for_and_by_copies(broken, device):
    params, ours, theirs = pair("Adam", device)
    broken.kernels = out_of_shared_memory("step")
    with pytest.warns(UserWarning, match=WARNING):
        train(params, (ours, theirs), range(4, 6))
    broken.kernels = {}
    assert copy.deepcopy(ours)._kernel_failures == {}
    ours.backend = "triton"
    train(params, (ours, theirs), range(6, 8))
    assert "backend triton" in ours.layout()
    close(*params, 1e-12)


def test_kernels_that_clipped_leave_their_norm_to_torch(device):
    """Whoever changes the backend between ``clip_grad_norm_`` and ``step`` gets clipped gradients all the same."""
    params, ours, theirs = pair("SGD", device, backend="triton")
    for its in params:
        give_gradients(its, 4, plain=True)
    ours.clip_grad_norm_(0.1)
    ours.backend = "torch"
    ours.step()
    torch.nn.utils.clip_grad_norm_(params[1], 0.1)
    theirs.step()
    close(*params, 1e-6)
