"""torch's own table of optimizer cases (``optim_db``), run through our classes.

The oracle is torch.optim's for-loop in float64, where torch's own tests compare its implementations with each other.
"""

import warnings

import pytest
import torch
from cases import give_gradients, model
from options import IN_TORCH
from pairs import Pair, close, raised, same_bits
from thinning import every_pair, every_value
from torch_table import INFOS, every_info, every_input, exact, inputs

import fusedopt


def test_torchs_table_knows_our_classes():
    assert set(IN_TORCH) <= set(INFOS)
    assert len(IN_TORCH) >= 5


@every_input
def test_trajectory(name, index, device):
    """States, step counts and parameters in every layout, with gradients that come late or stay away."""
    options = exact(inputs(name)[index].kwargs)
    pair = Pair(name, options, "small", device=device, start=0)
    pair.step(9)
    pair.check()


@every_value
@every_input
def test_implementations_of_torch_are_hints(name, index, device):
    """``foreach`` and ``fused``, where torch's class takes them, change nothing."""
    for flag in set(INFOS[name].supported_impls) & {"foreach", "fused"}:
        options = exact(inputs(name)[index].kwargs)
        flags = {flag: True}
        refused = raised(lambda o=options, f=flags: getattr(torch.optim, name)(model("tiny"), **o, **f))
        error = raised(lambda o=options, f=flags: fusedopt.registry[name](model("tiny"), **o, **f))
        assert (type(error), str(error)) == (type(refused), str(refused))
        if refused is None:
            pair = Pair(name, options, "tiny", device=device, start=0, **flags)
            pair.step(6)
            pair.check()


@every_input
def test_differentiable(name, index):
    """torch's own step: the same numbers, and the same derivatives by the gradients."""
    results = []
    for cls in (fusedopt.registry[name], getattr(torch.optim, name)):
        starts = [p.detach().clone().requires_grad_() for p in model("tiny")]
        params = [start.clone() for start in starts]
        gradients = [torch.full_like(p, 0.5, requires_grad=True) for p in params]
        optimizer = cls(params, **inputs(name)[index].kwargs, differentiable=True)
        for p, g in zip(params, gradients):
            p.grad = g * 1.0
        optimizer.step()
        sum(p.square().sum() for p in params).backward()
        # SGD clones the first gradient into its momentum, detached: None.
        results.append([*params, *(x.grad for x in starts + gradients)])
    assert all(a is b is None or same_bits(a, b) for a, b in zip(*results))


@every_info
def test_errors(name, device):
    """The exceptions of torch's table, with torch's words."""
    if INFOS[name].optim_error_inputs_func is None:
        pytest.skip("torch's table has no errors for it")

    def outcome(cls, case):
        given = case.optimizer_error_input
        # None stands for parameters of any kind; the construction fails before they are looked at.
        params = model("tiny") if given.params is None else given.params
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            error = raised(lambda: cls(params, **given.kwargs))
        if error is None:
            error = raised(cls(params, **given.kwargs).step)
        return type(error), str(error)

    def cases():
        return INFOS[name].optim_error_inputs_func(device="cpu", dtype=torch.float32)

    assert cases()
    for mine, theirs in zip(cases(), cases()):
        found = outcome(fusedopt.registry[name], mine)
        assert issubclass(found[0], mine.error_type)
        assert found == outcome(getattr(torch.optim, name), theirs)


@every_pair
@every_input
@pytest.mark.parametrize("shape", [(), (1,)], ids=["0-dim", "1-element"])
def test_tensor_lr(name, index, shape, device):
    """The same step as with a number, and the tensor stays the object that it was."""
    options = {**inputs(name)[index].kwargs}
    lr = float(options.get("lr", 1e-3))
    tensor = torch.full(shape, lr, dtype=torch.float64)
    results = []
    for given in (lr, tensor):
        params = model("tiny", device=device)
        optimizer = fusedopt.registry[name](params, **{**options, "lr": given})
        for number in range(5):
            give_gradients(params, number)
            optimizer.step()
            assert optimizer.param_groups[0]["lr"] is given
        results.append(params)
    # The same numbers in the same calls.
    assert all(map(same_bits, *results))
    assert tensor == lr


@every_value
@every_input
def test_groups_are_like_several_optimizers(name, index, device):
    options = inputs(name)[index].kwargs
    cls = fusedopt.registry[name]
    together, apart = model("small", device=device), model("small", device=device)
    second = {"lr": float(options.get("lr", 1e-3)) * 0.5}
    groups = [{"params": together[::2]}, {"params": together[1::2], **second}]
    optimizers = [cls(apart[::2], **options), cls(apart[1::2], **{**options, **second})]
    optimizer = cls(groups, **options)
    for number in range(5):
        give_gradients(together, number)
        give_gradients(apart, number)
        for each in (optimizer, *optimizers):
            each.step()
    # Gathered otherwise, so vectorised at other elements: a few roundings of float64.
    close(together, apart, 1e-14)
    # An lr of zero, weight decay included, moves nothing.
    optimizer.param_groups[1]["lr"] = 0.0
    before = [p.detach().clone() for p in groups[1]["params"]]
    give_gradients(together, 5, plain=True)
    optimizer.step()
    if name not in ("Rprop", "ASGD"):  # whose lr is where the step sizes begin, or counts from the next step on
        assert all(map(torch.equal, before, groups[1]["params"]))


@every_input
def test_gradients_of_zero_and_none(name, index, device):
    """Without gradients nothing happens, not even a state; what zero gradients do, they do in torch."""
    options = inputs(name)[index].kwargs
    results = []
    for cls in (fusedopt.registry[name], getattr(torch.optim, name)):
        params = model("small", device=device)
        optimizer = cls(params, **exact(options), foreach=False)
        states = {k: list(state) for k, state in optimizer.state_dict()["state"].items()}
        before = [p.detach().clone() for p in params]
        loss = optimizer.step(lambda: torch.tensor(1.0))
        assert loss == 1.0
        assert all(map(torch.equal, params, before))
        assert {k: list(state) for k, state in optimizer.state_dict()["state"].items()} == states
        for _ in range(3):
            for p in params:
                p.grad = torch.zeros_like(p)
            optimizer.step()
        results.append((params, optimizer.state_dict()["state"]))
        if not options.get("weight_decay") and name not in ("AdamW", "ASGD"):  # which decay by default
            assert all(map(torch.equal, params, before))
    close(results[0][0], results[1][0], 1e-14)
    assert {k: list(s) for k, s in results[0][1].items()} == {k: list(s) for k, s in results[1][1].items()}


@every_input
def test_printed_as_torchs(name, index):
    printed = [
        repr(cls(model("tiny"), **inputs(name)[index].kwargs))
        for cls in (fusedopt.registry[name], getattr(torch.optim, name))
    ]
    assert printed[0] == printed[1]


@every_info
def test_complex_is_like_two_reals(name, device):
    """Complex parameters mixed with real ones: torch's own step."""
    for each in inputs(name):
        results = []
        for view in (lambda x: x, lambda x: torch.view_as_real(x) if x.is_complex() else x):
            params = [view(p.detach() + 0.5j if k % 2 else p.detach()).clone() for k, p in enumerate(model("tiny"))]
            optimizer = fusedopt.registry[name](params, **each.kwargs)
            for number in range(3):
                for k, p in enumerate(model("tiny")):
                    g = p.detach() * (0.5 - number)
                    params[k].grad = view(g + 0.3j if k % 2 else g).clone()
                optimizer.step()
            results.append([torch.view_as_real(p) if p.is_complex() else p for p in params])
        # torch takes complex numbers for pairs of reals; the plain real ones go through another path of ours.
        close(*results, 1e-12)


@every_info
def test_sparse_gradients(name):
    """As far as torch's class takes them, its own step: the same bits."""
    if not INFOS[name].supports_sparse:
        pytest.skip("torch's class refuses them; test_torch_step.py asks whether ours does")
    overrides, _ = INFOS[name].metadata_for_sparse
    for each in inputs(name):
        options = {**each.kwargs, **overrides}
        if options.get("weight_decay") or options.get("nesterov") or options.get("momentum"):
            continue  # torch refuses or densifies
        results = []
        for cls in (fusedopt.registry[name], getattr(torch.optim, name)):
            p = torch.nn.Parameter(torch.linspace(1, 2, 8, dtype=torch.float64).view(4, 2))
            optimizer = cls([p], **options)
            for number in range(6):
                rows = torch.tensor([[number % 4, 2, 2]])  # not coalesced
                p.grad = torch.sparse_coo_tensor(rows, torch.ones(3, 2, dtype=torch.float64), (4, 2))
                optimizer.step()
            results.append(p)
        assert same_bits(*results)
