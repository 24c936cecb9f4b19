"""What no fused step can do: sparse, complex, differentiable and repeated parameters go to torch's own step."""

import pytest
import torch
from cases import every_torch_optimizer, give_gradients, model
from options import LR, STATEFUL
from pairs import both, close

import fusedopt
from fusedopt import torch_step
from fusedopt.engine import Engine


@pytest.mark.parametrize("name", ["SGD", "Adagrad"])  # torch's other optimizers refuse sparse gradients
def test_sparse_gradients(name):
    def build():
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Embedding(9, 4, sparse=True), torch.nn.Linear(4, 3)).double()

    pairs = both(name, build)
    for number in range(6):
        for module, optimizer in pairs:
            optimizer.zero_grad()
            module(torch.tensor([number, 2, 5])).square().sum().backward()
            if number in (2, 3):  # dense for once, then sparse again
                module[0].weight.grad = module[0].weight.grad.to_dense()
            optimizer.step()
    # float64, and torch's own code where it is sparse.
    close(pairs[0][0].parameters(), pairs[1][0].parameters(), 1e-12)


@every_torch_optimizer
def test_refused_gradients_are_refused_as_by_torch(name):
    if name in ("SGD", "Adagrad"):
        return
    pairs = both(name, lambda: torch.nn.Embedding(9, 4, sparse=True))
    messages = []
    for module, optimizer in pairs:
        before = module.weight.detach().clone()
        module(torch.tensor([1])).sum().backward()
        with pytest.raises(RuntimeError) as error:
            optimizer.step()
        messages.append(str(error.value))
        assert torch.equal(module.weight, before)
    assert messages[0] == messages[1]


@every_torch_optimizer
def test_complex_parameters(name, device):
    params = [
        [torch.nn.Parameter(p.detach() + 0.5j) for p in model("tiny", device=device)] + model("tiny", device=device)
        for _ in range(2)
    ]
    options = {"lr": LR, **STATEFUL[name], "foreach": False}
    ours = fusedopt.registry[name](params[0], **options)
    theirs = getattr(torch.optim, name)(params[1], **options)
    for number in range(4):
        for its, optimizer in zip(params, (ours, theirs)):
            give_gradients(its, number, plain=True)
            optimizer.step()
    close(*params, 1e-12)


def test_a_complex_parameter_is_looked_for_once(monkeypatch):
    """Steps after the first do not plan again, for as long as that parameter is there, complex, and has a gradient."""
    planned = []
    build = Engine._build
    monkeypatch.setattr(Engine, "_build", lambda *args: planned.append(True) or build(*args))
    real, complex_ = params = [torch.nn.Parameter(torch.ones(3, dtype=d)) for d in (torch.float32, torch.complex64)]
    optimizer = fusedopt.SGD(params, lr=0.1)

    def step(*stepped):
        for p in params:
            p.grad = torch.ones_like(p) if any(p is q for q in stepped) else None
        before = len(planned)
        optimizer.step()
        return len(planned) - before

    assert [step(*params), step(*params), step(complex_), step(*params)] == [1, 0, 0, 0]
    assert "complex" in optimizer.layout()
    assert [step(real), step(real)] == [1, 0]
    assert "complex" not in optimizer.layout()
    assert [step(*params), step(*params)] == [1, 0]
    del optimizer.param_groups[0]["params"][1]
    assert step(*params) == 1
    assert torch.allclose(real, torch.full((3,), 1 - 0.8)) and torch.allclose(complex_, torch.full((3,), 0.4 + 0j))


@every_torch_optimizer
def test_differentiable(name):
    """The step as a function of the gradient: its derivative is torch's."""
    results = []
    for cls in (fusedopt.registry[name], getattr(torch.optim, name)):
        start = torch.linspace(1, 2, 4, dtype=torch.float64, requires_grad=True)
        gradient = torch.linspace(-1, 1, 4, dtype=torch.float64, requires_grad=True)
        p = start.clone()
        p.grad = gradient
        optimizer = cls([p], lr=0.1, differentiable=True)
        optimizer.step()
        p.square().sum().backward()
        results.append((p, start.grad, gradient.grad))
    assert all(map(torch.equal, *results))
    assert results[0][2].any() or name == "Rprop"  # which looks at the sign alone


@every_torch_optimizer
def test_parameter_listed_twice(name):
    """torch warns, and steps it twice."""
    pair = []
    for cls in (fusedopt.registry[name], getattr(torch.optim, name)):
        params = model()
        with pytest.warns(UserWarning, match="duplicate parameters"):
            optimizer = cls([*params, params[1]], lr=LR)
        for number in range(3):
            give_gradients(params, number, plain=True)
            optimizer.step()
        pair.append(params)
    close(*pair, 1e-12)


def sparse(p):
    p.grad = torch.ones_like(p).to_sparse()
    return [p], {}


def twice(p):
    p.grad = torch.ones_like(p)
    return [p, p], {}


def complex_number(p):
    p = torch.nn.Parameter(p.detach().to(torch.complex64))
    p.grad = torch.ones_like(p)
    return [p], {}


def differentiable(p):
    p.grad = torch.ones_like(p)
    return [p], {"differentiable": True}


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters")
@pytest.mark.parametrize(
    "make, remedy",
    [
        (sparse, "sparse=False"),
        (twice, "list it once"),
        (complex_number, "view_as_complex"),
        (differentiable, "leave differentiable out"),
    ],
)
def test_the_remedy_fits_the_reason(make, remedy):
    params, options = make(torch.nn.Parameter(torch.zeros(4)))
    optimizer = fusedopt.SGD(params, lr=1.0, max_grad_norm=1.0, **options)
    with pytest.raises(RuntimeError, match=f"max_grad_norm cannot be combined.*; leave the setting out, or .*{remedy}"):
        optimizer.step()
    assert not params[0].detach().abs().any() and not optimizer.state


@pytest.fixture
def gpu_without_kernels(monkeypatch):
    """CPUs count as such."""
    monkeypatch.setattr(torch_step, "FALLBACK_IS_FOR", set())
    torch_step._say_once.cache_clear()


@pytest.mark.usefixtures("gpu_without_kernels")
@every_torch_optimizer
def test_a_gpu_without_kernels_is_left_to_torch(name):
    ours, theirs = model("tiny"), model("tiny")
    options = {"lr": LR, **STATEFUL[name]}
    optimizer, oracle = fusedopt.registry[name](ours, **options), getattr(torch.optim, name)(theirs, **options)
    with pytest.warns(UserWarning, match="torch.optim's own step runs on cpu") as warned:
        for number in range(4):
            for params, its in ((ours, optimizer), (theirs, oracle)):
                give_gradients(params, number, plain=True)
                its.step()
    assert len(warned) == 1 and warned[0].filename == __file__
    assert "own step" in optimizer.layout()
    assert all(torch.equal(p, q) for p, q in zip(ours, theirs))
    # What torch cannot do is done here, with the states that torch's step left.
    optimizer.max_grad_value = 0.1
    for params, its in ((ours, optimizer), (theirs, oracle)):
        give_gradients(params, 4, plain=True)
        torch.nn.utils.clip_grad_value_(theirs, 0.1)
        its.step()
    assert "own step" not in optimizer.layout()
    close(ours, theirs, 1e-6)


@pytest.mark.usefixtures("gpu_without_kernels")
def test_a_warning_names_the_users_line_behind_what_wraps_the_step():
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = fusedopt.SGD([p], lr=0.1)
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    optimizer.register_step_pre_hook(lambda *step: None)
    p.grad = torch.ones(3)
    with pytest.warns(UserWarning, match="torch.optim's own step runs on cpu") as warned:
        optimizer.step()
    assert warned[0].filename == __file__


@pytest.mark.usefixtures("gpu_without_kernels")
def test_what_torch_lacks_is_not_left_to_it(recwarn):
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = fusedopt.Lion([p], lr=0.1)
    p.grad = torch.ones(3)
    optimizer.step()
    assert torch.allclose(p, torch.full((3,), 0.9)) and "lion on cpu" in optimizer.layout() and not recwarn.list


@pytest.mark.usefixtures("gpu_without_kernels")
def test_gradient_release_is_not_left_to_torch():
    model = torch.nn.Linear(3, 2)
    optimizer = fusedopt.SGD(model.parameters(), lr=0.5)
    fusedopt.enable_gradient_release(model, optimizer)
    before = model.bias.detach().clone()
    model(torch.ones(1, 3)).sum().backward()
    assert torch.equal(model.bias, before - 0.5) and model.bias.grad is None


@every_torch_optimizer
def test_parameters_without_memory(name):
    """A model that is built on the meta device, tried there, and given memory later."""
    if name == "ASGD":
        return  # torch's reads numbers from its states
    made = torch.nn.Linear(3, 2, device="meta")
    options = {"lr": LR, **STATEFUL[name]}
    ours = fusedopt.registry[name](made.parameters(), **options)
    theirs = getattr(torch.optim, name)(torch.nn.Linear(3, 2, device="meta").parameters(), **options)
    for optimizer in (ours, theirs):
        for p in optimizer.param_groups[0]["params"]:
            p.grad = torch.ones_like(p)
        optimizer.step()
    for mine, its in zip(ours.state.values(), theirs.state.values(), strict=True):
        assert {k: (v.shape, v.device) for k, v in mine.items()} == {k: (v.shape, v.device) for k, v in its.items()}


@every_torch_optimizer
def test_states_that_a_subclass_prepares(name):
    """What it overrides is called, as by torch, since nobody else calls it."""
    calls = []

    def subclass(base):
        def _init_group(self, group, *args):
            calls.append(base)
            return super(cls, self)._init_group(group, *args)

        cls = type(name, (base,), {"_init_group": _init_group})
        return cls

    options, bases = {"lr": LR, **STATEFUL[name]}, (fusedopt.registry[name], getattr(torch.optim, name))
    params, optimizers = [model("tiny") for _ in bases], []
    for its, base in zip(params, bases):
        optimizers.append(subclass(base)(its, **options, foreach=False))
        for number in range(3):
            give_gradients(its, number, plain=True)
            optimizers[-1].step()
    assert calls.count(bases[0]) == calls.count(bases[1]) == 3
    close(*params, 1e-12)
    optimizers[0].max_grad_norm = 1.0
    with pytest.raises(RuntimeError, match=f"max_grad_norm cannot be combined with {name}'s own _init_group"):
        optimizers[0].step()
